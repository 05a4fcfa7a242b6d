"""Folders of tiny models to corrupt, written without torch, and the readers that open them."""

import dataclasses
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import moddistill
from moddistill.config import ExpertConfig
from moddistill.convert.describe import describe
from moddistill.convert.exporting import export_model
from moddistill.convert.importing import import_model
from moddistill.convert.upcycling import upcycle_model
from moddistill.data.tokenizer import load_tokenizer, train_bpe
from moddistill.distributed.sharding import unbox
from moddistill.models.presets import preset, with_vocabulary
from moddistill.models.upcycle import upcycle_config
from moddistill.models.vlm import ModelConfig, abstract_params
from moddistill.storage.model_folder import save_model
from moddistill.storage.safetensors import create_file
from moddistill.storage.shards import open_checkpoint, read_file
from moddistill.storage.tensor import TensorSpec

TEXTS = ["what colour is the shape? a red circle, no triangle. yes no " * 3]


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value))


def write_model_json(folder: Path, value: Any) -> None:
    """Replaces the description of a model folder."""
    write_json(folder / "model.json", value)


def make_folders(root: Path) -> None:
    """Writes each kind of folder and file that is read, intact and tiny, below `root`."""
    tokenizer = train_bpe(TEXTS, 300)
    dense = with_vocabulary(preset("tiny"), tokenizer.real_ids, tokenizer.image_id)
    tower = dataclasses.replace(dense.vision, num_layers=2, select_layer=-2)
    dense = dataclasses.replace(dense, vision=tower)
    sparse = upcycle_config(dense, ExpertConfig(num_experts=2, top_k=2))
    text = dataclasses.replace(dense, vision=None)
    models = {
        "model": sparse,
        "dense_model": text,
        "llava_model": dense,
        "sparse_model": dataclasses.replace(sparse, vision=None),
    }
    for name, config in models.items():
        save_model(root / name, config, _random_params(config), tokenizer, {})
    for name in ("llava", "sparse"):
        export_model(root / f"{name}_model", root / name, max_shard_size=10**9)
    export_model(root / "dense_model", root / "language", max_shard_size=10**9)
    export_model(root / "dense_model", root / "shards", max_shard_size=20_000)
    _make_parts(root)
    _make_original(root)
    _make_vocabulary(root)


def _random_params(config: ModelConfig) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.02, leaf.shape), jnp.float32),
        unbox(abstract_params(config)),
    )


def _arrays(folder: Path, prefix: str) -> dict[str, np.ndarray]:
    tensors = open_checkpoint(folder)
    return {
        name.removeprefix(prefix): np.array(tensor.read())
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def save_tensors(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A safetensors file."""
    places = create_file(file, [TensorSpec(name, x.dtype, x.shape) for name, x in arrays.items()])
    for name, array in arrays.items():
        places[name].map("r+")[...] = array


def _make_parts(root: Path) -> None:
    """A tower, and a projector in each format."""
    (root / "tower").mkdir()
    write_json(root / "tower/config.json", read_json(root / "llava/config.json")["vision_config"])
    pixels = (root / "llava/preprocessor_config.json").read_text()
    (root / "tower/preprocessor_config.json").write_text(pixels)
    save_tensors(root / "tower/model.safetensors", _arrays(root / "llava", "vision_tower."))
    (root / "projector").mkdir()
    layers = _arrays(root / "llava", "multi_modal_projector.linear_")
    names = {"1": "mm_projector.0", "2": "mm_projector.2"}
    projector = {f"{names[name[0]]}{name[1:]}": array for name, array in layers.items()}
    save_tensors(root / "projector/projector.safetensors", projector)
    save_pickled(root / "projector/projector.bin", projector)


def _make_original(root: Path) -> None:
    """A checkpoint of the original code, with its weights in a `.bin`."""
    folder = root / "original"
    folder.mkdir()
    arrays = _arrays(root / "language", "")
    arrays |= {f"model.{k}": x for k, x in _projector(root).items()}
    save_pickled(folder / "pytorch_model.bin", arrays)
    fields = read_json(root / "language/config.json")
    fields |= {"model_type": "llava_qwen2", "mm_projector_type": "mlp2x_gelu"}
    write_json(folder / "config.json", fields)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((root / "language" / name).read_bytes())


def _projector(root: Path) -> dict[str, np.ndarray]:
    tensors = read_file(root / "projector/projector.safetensors")
    return {name: np.array(tensor.read()) for name, tensor in tensors.items()}


def _make_vocabulary(root: Path) -> None:
    """A tokenizer as `vocab.json` and `merges.txt`."""
    folder = root / "vocabulary"
    folder.mkdir()
    model = read_json(root / "language/tokenizer.json")["model"]
    merges = [" ".join(pair) for pair in model["merges"]]
    write_json(folder / "vocab.json", model["vocab"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", settings)


def pickled(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The pickle in which `torch.save` describes float32 tensors."""
    parts = [b"\x80\x02}("]
    for i, (name, array) in enumerate(arrays.items()):
        strides = [x // array.itemsize for x in array.strides]
        parts += [
            _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((",
            _text("storage") + b"ctorch\nFloatStorage\n" + _text(str(i)) + _text("cpu"),
            _number(array.size) + b"tQ" + _number(0),
            b"(" + b"".join(map(_number, array.shape)) + b"t",
            b"(" + b"".join(map(_number, strides)) + b"t",
            b"\x89ccollections\nOrderedDict\n)RtR",
        ]
    return b"".join([*parts, b"u."])


def _text(text: str) -> bytes:
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()


def _number(number: int) -> bytes:
    return b"J" + number.to_bytes(4, "little", signed=True)


def save_pickled(file: Path, arrays: Mapping[str, np.ndarray], text: bytes | None = None) -> None:
    """A `.bin` file; with `text`, its description is that."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(arrays) if text is None else text)
        for i, array in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{i}", array.astype(np.float32).tobytes())


def readers(root: Path, out: Path) -> dict[str, Callable[[Path], Any]]:
    """Returns readers of a folder by name: converter commands and library functions."""
    language, tower = str(root / "language"), str(root / "tower")
    return {
        "import": lambda folder: import_model(str(folder), out),
        "with tower": lambda folder: import_model(str(folder), out, vision=tower),
        "vision": lambda folder: import_model(language, out, vision=str(folder)),
        "projector": lambda folder: import_model(
            language, out, vision=tower, projector=str(next(folder.iterdir()))
        ),
        "inspect": lambda folder: describe(str(folder)),
        "inspect file": lambda folder: describe(str(next(folder.iterdir()))),
        "export": lambda folder: export_model(folder, out, max_shard_size=10**9),
        "upcycle": lambda folder: upcycle_model(folder, out, ExpertConfig()),
        "load": moddistill.load,
        "tokenizer": lambda folder: load_tokenizer(str(folder)),
    }
