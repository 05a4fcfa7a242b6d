import re
from pathlib import Path

from moddistill import models

SHAPE = r'(?:Float|Int|Bool|UInt8)\[Array, "([^"]*)"\]'
EINSUM = r'einsum\(\s*"([^"]*)"'


def test_every_shape_letter_is_defined_and_every_definition_is_used():
    folders = [Path(models.__file__).parent, Path(models.__file__).parents[1] / "losses"]
    code = "".join(file.read_text() for folder in folders for file in folder.rglob("*.py"))
    shapes = " ".join(re.findall(SHAPE, code) + re.findall(EINSUM, code))
    # Pixels are counted as `I` images of `h` times `w`, which only the batch's docstring says.
    used = set(re.findall("[A-Za-z]", shapes)) | {"I"}
    definitions = models.__doc__.split(":\n\n", 1)[1]
    defined = re.findall(r"(?:^| {2}|, )([A-Za-z])(?=[ ,])", definitions, re.MULTILINE)
    assert len(set(defined)) == len(defined)
    assert set(defined) == used
