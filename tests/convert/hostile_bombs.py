"""Files that would fill memory or time, opened in a process whose peak memory is measured.

    python -m tests.convert.hostile_bombs FOLDER

prints a JSON line for each: its name, the error, seconds of the processor, and by how many bytes
the peak of resident memory is above that of reading intact folders.
"""

import json
import resource
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.convert import hostile_tokenizers
from tests.convert.hostile_folders import make_folders, readers, save_pickled, write_json

MIB = 2**20


def _header(text: bytes) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        with (folder / "model.safetensors").open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)

    return corrupt


def _entries(count: int) -> bytes:
    entry = '"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    return ("{" + ",".join(entry.format(i) for i in range(count)) + "}").encode()


def _index(count: int) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        places = {f"{i}": f"{i}.safetensors" for i in range(count)}
        write_json(folder / "model.safetensors.index.json", {"weight_map": places})

    return corrupt


def _zeros(entry: str, size: int) -> Callable[[Path], None]:
    """An archive whose `entry` inflates to `size` zeros."""

    def corrupt(folder: Path) -> None:
        for file in folder.iterdir():
            file.unlink()
        file = folder / "projector.bin"
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
            archive.open(entry, "w", force_zip64=True) as stream,
        ):
            for _ in range(size // (16 * MIB)):
                stream.write(bytes(16 * MIB))

    return corrupt


def _sparse(name: str, size: int) -> Callable[[Path], None]:
    """A file of `size` zeros, which takes no room on the disk."""

    def corrupt(folder: Path) -> None:
        with (folder / name).open("wb") as stream:
            stream.truncate(size)

    return corrupt


def _long_pickle(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    save_pickled(folder / "projector.bin", {"x": np.ones(4)}, b"K\x01" * (6 * MIB))


BOMBS: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "header of 90 MB of lists": ("language", "import", _header(b"[" + b"[]," * 30 * MIB)),
    "header of 16 MB of lists": ("language", "import", _header(b"[" + b"[]," * 5 * MIB + b"0]")),
    "90,000 tensors": ("language", "import", _header(_entries(90_000))),
    "a million tensors": ("language", "import", _header(_entries(10**6))),
    "index of a million": ("shards", "import", _index(10**6)),
    "index of 90,000": ("shards", "import", _index(90_000)),
    "description of 1 GiB in an archive": (
        "projector",
        "inspect file",
        _zeros("archive/data.pkl", 1024 * MIB),
    ),
    "pickle of 12 MB": ("projector", "inspect file", _long_pickle),
    "config of 12 GiB": ("language", "import", _sparse("config.json", 12 * 1024 * MIB)),
    "tokenizer of 12 GiB": ("language", "tokenizer", _sparse("tokenizer.json", 12 * 1024 * MIB)),
    "template of 12 GiB": ("llava", "import", _sparse("chat_template.jinja", 12 * 1024 * MIB)),
    "tokenizer settings of 12 GiB": (
        "vocabulary",
        "tokenizer",
        _sparse("tokenizer_config.json", 12 * 1024 * MIB),
    ),
    "merges of 12 GiB": ("vocabulary", "tokenizer", _sparse("merges.txt", 12 * 1024 * MIB)),
    "model.json of 12 GiB": ("model", "load", _sparse("model.json", 12 * 1024 * MIB)),
    **{
        name: ("language", "tokenizer", hostile_tokenizers.changed(keys, value))
        for name, (keys, value, _) in hostile_tokenizers.FIELDS.items()
    },
}


def main(root: Path) -> None:
    """Opens all files, one after the other."""
    make_folders(root)
    opened = readers(root, root / "out")
    for base, reader in (("llava", "import"), ("tower", "vision")):
        opened[reader](root / base)  # imports packages and traces the models
        shutil.rmtree(root / "out")
    usual = _peak()
    for name, (base, reader, corrupt) in BOMBS.items():
        folder = root / "case"
        shutil.copytree(root / base, folder)
        corrupt(folder)
        began = time.process_time()
        try:
            opened[reader](folder)
            error = ""
        except ValueError as raised:
            error = str(raised)
        seconds = time.process_time() - began
        shutil.rmtree(folder)
        row = {"name": name, "error": error, "seconds": seconds, "bytes": _peak() - usual}
        print(json.dumps(row), flush=True)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]))
