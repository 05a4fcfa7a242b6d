"""Hostile weights: safetensors headers, pickles, non-finite numbers, corrupt arrays."""

import json
import random
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moddistill.storage.shards import open_checkpoint, read_file
from tests.convert.hostile import DEEP, VALUES, Case
from tests.convert.hostile_folders import pickled, save_pickled, save_tensors


def header_cases() -> Iterator[Case]:
    """Headers of safetensors."""
    for name, header in HEADERS.items():

        def corrupt(folder: Path, header=header) -> None:
            text = header if isinstance(header, str) else json.dumps(header)
            data = len(text.encode()).to_bytes(8, "little") + text.encode() + b"\0" * 16
            (folder / "model.safetensors").write_bytes(data)

        yield Case(f"import language: header: {name}", "language", "import", corrupt)


def _entry(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HEADERS: dict[str, Any] = {
    "a list": [],
    "a text": "x",
    "deep": DEEP,
    "entry is null": {"x": None},
    "entry is a number": {"x": 3},
    "entry is empty": {"x": {}},
    **{f"dtype is {name}": _entry(dtype=x) for name, x in VALUES.items()},
    **{f"shape is {name}": _entry(shape=x) for name, x in VALUES.items()},
    **{f"shape holds {name}": _entry(shape=[x, 4]) for name, x in VALUES.items()},
    **{f"offsets are {name}": _entry(offsets=x) for name, x in VALUES.items()},
    **{f"an offset is {name}": _entry(offsets=[0, x]) for name, x in VALUES.items()},
    **{
        f"dtype {dtype}": _entry(dtype, (16 // size,))
        for dtype, size in (("F8_E4M3", 1), ("F8_E5M2", 1), ("F8_E8M0", 1), ("U16", 2), ("I4", 1))
    },
    "dtype F4": _entry("F4", (32,)),
    "dtype F6_E2M3": _entry("F6_E2M3", (64,), (0, 48)),
    "dtype C64": _entry("C64", (2,)),
    "a product that overflows": _entry(shape=[2**32, 2**32, 2**32]),
    "a thousand axes": _entry(shape=[1] * 1000 + [4]),
    "a huge axis of an empty tensor": _entry(shape=[0, 10**30], offsets=[0, 0]),
    "tensors that overlap": _entry() | {"y": _entry()["x"]},
    "tensors with a gap": _entry(offsets=[0, 8], shape=[2])
    | {"y": _entry(offsets=[12, 16], shape=[1])["x"]},
    "one name twice": json.dumps(_entry(shape=[2], offsets=[0, 8]))[:-1]
    + ","
    + json.dumps(_entry(shape=[2], offsets=[8, 16]))[1:],
    "only metadata": {"__metadata__": {"format": "pt"}},
    "names of surrogates": {"\ud800": _entry()["x"]},
}


def pickle_cases() -> Iterator[Case]:
    """Descriptions of a `.bin`, as a projector's file."""
    for name, text in PICKLES.items():

        def corrupt(folder: Path, text=text) -> None:
            _only(folder, ".bin")
            save_pickled(folder / "projector.bin", {"x": np.ones(4)}, text)

        yield Case(f"inspect file: pickle: {name}", "projector", "inspect file", corrupt)


def _only(folder: Path, suffix: str) -> Path:
    """The file of that suffix, after removing the others."""
    for file in folder.iterdir():
        if file.suffix != suffix:
            file.unlink()
    return next(folder.iterdir())


def _tensor(storage: bytes = b"", start: bytes = b"K\x00", shape: bytes = b"K\x04\x85") -> bytes:
    """Returns the pickle of one tensor with a custom part."""
    valid = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
    return (
        b"\x80\x02}X\x01\0\0\0xctorch._utils\n_rebuild_tensor_v2\n("
        + (storage or valid)
        + start
        + shape
        + b"K\x01\x85\x89ccollections\nOrderedDict\n)RtRs."
    )


def _doubled(times: int) -> bytes:
    """A tuple of two, of two, and so on: 2 ** times in all, in a few bytes each."""
    return b")" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(times))


PICKLES: dict[str, bytes] = {
    "empty": b"",
    "only a stop": b".",
    "a number": b"K\x01.",
    "a list": b"].",
    "an empty stack": b"0.",
    "a system call": b"cos\nsystem\n(X\x04\0\0\0trueitR.",
    "a system call of protocol 4": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "an instance": b"(cos\nsystem\no.",
    "an old instance": b"(ios\nsystem\n.",
    "an extension": b"\x82\x01.",
    "getattr": b"c__builtin__\ngetattr\n.",
    "a call of a dtype": b"ctorch\nFloatStorage\n)R.",
    "a state for a dtype": b"ctorch\nFloatStorage\n}b.",
    "a memo of two billion": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a memo that is missing": b"\x80\x02h\x07.",
    "a text of an exabyte": b"\x80\x04\x8d" + (2**60).to_bytes(8, "little") + b"x.",
    "an array of an exabyte": b"\x80\x05\x96" + (2**60).to_bytes(8, "little") + b"x.",
    "a frame of an exabyte": b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"}.",
    "a number of a gigabyte": b"\x80\x02\x8b\xff\xff\xff\x3f1.",
    "a number of negative length": b"\x80\x02\x8b\xff\xff\xff\xff1.",
    "a number of 10000 digits": b"I" + b"9" * 10_000 + b"\n.",
    "100000 marks": b"(" * 100_000 + b".",
    "100000 nested lists": b"]" * 100_000 + b"a" * 99_999 + b".",
    "a key of 2^40 tuples": b"\x80\x02}" + _doubled(40) + b"K\x01s.",
    "a shape of 2^40 tuples": _tensor(shape=_doubled(40)),
    "a storage of 2^40 tuples": _tensor(storage=_doubled(40) + b"Q"),
    "a shape that is negative": _tensor(shape=b"J\xff\xff\xff\xff\x85"),
    "a shape of a text": _tensor(shape=b"X\x01\0\0\x004\x85"),
    "a shape of true": _tensor(shape=b"\x88\x85"),
    "a shape that is null": _tensor(shape=b"N"),
    "a shape that is huge": _tensor(shape=b"\x8a\x20" + b"\x7f" * 32 + b"\x85"),
    "a start that is negative": _tensor(start=b"J\xff\xff\xff\xff"),
    "a start that is a text": _tensor(start=b"X\x01\0\0\x000"),
    "a storage that is null": _tensor(storage=b"N"),
    "a storage of another kind": _tensor(storage=b"X\x01\0\0\x000Q"),
    "a storage that is missing": _tensor().replace(b"\0\0\x000X", b"\0\0\x009X"),
    "a tensor with a state": _tensor()[:-2] + b"}X\x06\0\0\0offsetJ\0\0\0\x80sbs.",
    "a tensor without arguments": b"\x80\x02}K\x01ctorch._utils\n_rebuild_tensor_v2\n)Rs.",
    "a name that is a number": b"\x80\x02}K\x01" + _tensor()[8:],
    "no stop": _tensor()[:-1],
}


def archive_cases() -> Iterator[Case]:
    """Archives around such a description."""
    content = pickled({"x": np.ones(4, np.float32)})

    def archive(folder: Path, *entries: tuple[str, bytes], packed: int = zipfile.ZIP_STORED):
        _only(folder, ".bin")
        with zipfile.ZipFile(folder / "projector.bin", "w", packed) as made:
            for name, data in entries:
                made.writestr(name, data)

    data = ("archive/data/0", bytes(16))
    made = {
        "no description": (data,),
        "two descriptions": (("a/data.pkl", content), ("b/data.pkl", content), data),
        "no data": (("archive/data.pkl", content),),
        "data that is short": (("archive/data.pkl", content), (data[0], bytes(15))),
    }
    for name, entries in made.items():
        yield Case(
            f"inspect file: archive of {name}",
            "projector",
            "inspect file",
            lambda folder, entries=entries: archive(folder, *entries),
        )
    yield Case(
        "inspect file: archive that is compressed",
        "projector",
        "inspect file",
        lambda folder: archive(
            folder, ("archive/data.pkl", content), data, packed=zipfile.ZIP_DEFLATED
        ),
    )


def number_cases() -> Iterator[Case]:
    """Non-finite weights in each kind of file."""
    files = (
        ("language", "import", "model.safetensors", "model.layers.1.mlp.up_proj.weight"),
        ("sparse", "import", "model.safetensors", "model.layers.0.mlp.experts.1.up_proj.weight"),
        ("llava", "import", "model.safetensors", "language_model.model.embed_tokens.weight"),
        ("tower", "vision", "model.safetensors", "vision_model.post_layernorm.bias"),
        ("original", "with tower", "pytorch_model.bin", "model.mm_projector.2.bias"),
    )
    values = ("nan", "inf", "-inf", "nan", "inf")
    for value, (base, reader, file, tensor) in zip(values, files, strict=True):

        def corrupt(folder: Path, file=file, tensor=tensor, value=value) -> None:
            change_tensors(folder / file, {tensor: value})

        yield Case(f"{reader} {base}: {tensor} holds {value}", base, reader, corrupt)

    def projector(folder: Path) -> None:
        change_tensors(_only(folder, ".safetensors"), {"mm_projector.0.weight": "nan"})

    yield Case("projector: a weight is NaN", "projector", "projector", projector)


def change_tensors(file: Path, values: dict[str, str]) -> None:
    """Writes a number into the last place of tensors of a file."""
    arrays = {name: np.array(tensor.read()) for name, tensor in read_file(file).items()}
    for name, value in values.items():
        arrays[name].reshape(-1)[-1] = float(value)
    (save_tensors if file.suffix == ".safetensors" else save_pickled)(file, arrays)


def dtype_cases() -> Iterator[Case]:
    """A kernel in a dtype that no model is computed in."""
    for dtype in (np.int8, np.int64, np.bool_, ml_dtypes.float8_e4m3fn):

        def corrupt(folder: Path, dtype=dtype) -> None:
            arrays = {k: np.array(x.read()) for k, x in open_checkpoint(folder).items()}
            name = "model.layers.1.mlp.up_proj.weight"
            save_tensors(folder / "model.safetensors", arrays | {name: arrays[name].astype(dtype)})

        yield Case(f"import language: weights of {dtype.__name__}", "language", "import", corrupt)


def array_cases(rng: random.Random) -> Iterator[Case]:
    """Damage to the arrays of a model folder."""
    kinds = {
        "cut in half": lambda data: data[: len(data) // 2],
        "empty": lambda data: b"",
        "zeros": lambda data: bytes(len(data)),
        "noise": lambda data: rng.randbytes(len(data)),
        "missing": None,
    }
    for name, change in kinds.items():
        for reader in ("inspect", "load", "export"):
            # Only the first file for Orbax, which leaks threads when arrays cannot be read; all
            # others for the other readers.
            parts = ("/_METADATA",) if reader == "load" else ("/manifest.ocdbt", "/d/")
            for part in parts:

                def corrupt(folder: Path, change=change, part=part) -> None:
                    for file in sorted((folder / "params").rglob("*")):
                        if file.is_file() and part in str(file.relative_to(folder)):
                            if change is None:
                                file.unlink()
                            else:
                                file.write_bytes(change(file.read_bytes()))

                yield Case(f"{reader} model: {part} of params is {name}", "model", reader, corrupt)
    yield Case(
        "load model: params is missing",
        "model",
        "load",
        lambda folder: shutil.rmtree(folder / "params"),
    )
