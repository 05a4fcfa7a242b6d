"""Upcycling of a dense model folder to a sparse one, layer by layer, with one layer in memory."""

import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from moddistill.config import ExpertConfig, UpcycleConfig
from moddistill.convert.extras import POOLING
from moddistill.convert.finite import FiniteCheck
from moddistill.convert.importing import array_specs
from moddistill.convert.jinja_template import FILE
from moddistill.convert.resolve import as_model_folder
from moddistill.convert.rules import Slot, slots
from moddistill.data.tokenizer import load_tokenizer
from moddistill.models.upcycle import (
    COPY,
    check_upcycle,
    upcycle_config,
    upcycle_expert,
    upcycle_router,
)
from moddistill.models.vlm import ModelConfig
from moddistill.params import flatten, unflatten
from moddistill.storage.atomic_dir import write_folder
from moddistill.storage.model_folder import read_model_config, read_source, write_description
from moddistill.storage.orbax_layout import Reader, Writer

_upcycle_expert = jax.jit(upcycle_expert, static_argnames=("moe", "how"))


def upcycle_model(
    model: Path,
    out: Path,
    moe: ExpertConfig,
    how: UpcycleConfig = COPY,
    *,
    seed: int = 0,
    overwrite: bool = False,
) -> ModelConfig:
    """Upcycles a dense model folder, or Hugging Face folder, and returns the architecture.

    Args:
      moe: the experts of the sparse model.
      how: initialisation of the experts.
      seed: of routers and of noise.

    Raises:
      UserError: the model is sparse, or `moe` or `how` does not fit it.
    """
    original, model = model, as_model_folder(model)
    dense = read_model_config(model)
    sparse = upcycle_config(dense, moe)
    check_upcycle(how)
    reader = Reader(model / "params")
    reader.check(dense)
    finite = FiniteCheck(str(original))
    with write_folder(out, "upcycle", overwrite, inputs=(original, model)) as tmp_dir:
        _write_params(tmp_dir / "params", dense, sparse, how, reader, seed, finite)
        finite.close()
        source = {"upcycled": {"from": str(model), "seed": seed} | dataclasses.asdict(how)}
        source |= {key: value for key, value in read_source(model).items() if key == "imported"}
        write_description(tmp_dir, sparse, load_tokenizer(str(model)), source)
        for name in (POOLING, FILE):
            if (model / name).is_file():
                shutil.copy(model / name, tmp_dir)
    return sparse


def _write_params(
    folder: Path,
    dense: ModelConfig,
    sparse: ModelConfig,
    how: UpcycleConfig,
    reader: Reader,
    seed: int,
    finite: FiniteCheck,
) -> None:
    """Copies the parameters that both models have, then upcycles the feed-forward layers."""
    dense_slots, sparse_slots = slots(dense), slots(sparse)
    dense_dtypes = {path: reader.dtype(slot.path) for path, slot in dense_slots.items()}
    dtypes = {slot.path: _dtype(path, dense_dtypes) for path, slot in sparse_slots.items()}
    with Writer(folder, array_specs(sparse, dtypes)) as writer:
        common = sorted(dense_slots.keys() & sparse_slots.keys(), key=dense_slots.get)
        for path in tqdm(common, desc="copy", unit="array"):
            _copy(path, reader, dense_slots[path], writer, sparse_slots[path], finite)
        key = jax.random.key(seed)
        for layer in tqdm(sparse.decoder.moe_layers, desc="upcycle", unit="layer"):
            mlp = _read_mlp(reader, dense_slots, layer, finite)
            # The key of a layer does not depend on which other layers are sparse.
            rng = jax.random.fold_in(key, layer)
            for path, array in _expert_layer(mlp, sparse.decoder.moe, how, rng):
                slot = sparse_slots[f"decoder/layers/{layer}/moe/{path}"]
                writer.write(slot.path, slot.index, np.asarray(array))


def _expert_layer(
    mlp: dict[str, Any], moe: ExpertConfig, how: UpcycleConfig, rng: jax.Array
) -> Iterator[tuple[str, jax.Array]]:
    """Yields (path, array) of router and experts of a layer, one expert at a time."""
    yield from flatten(upcycle_router(mlp, moe, rng)).items()
    for number in range(moe.num_experts):
        for name, array in _upcycle_expert(mlp, moe, how, rng, number).items():
            yield f"{name}/{number}", array


def _dtype(path: str, dense_dtypes: dict[str, np.dtype]) -> np.dtype:
    """Returns the dtype of a sparse parameter: experts as the dense layer, routers float32."""
    if path in dense_dtypes:
        return dense_dtypes[path]
    dense = re.sub(r"/moe/experts_(\w+)/\d+$", r"/mlp/\1/kernel", path)
    dense = re.sub(r"/moe/residual/", "/mlp/", dense)
    return dense_dtypes.get(dense, np.dtype(np.float32))


def _copy(
    path: str, reader: Reader, source: Slot, writer: Writer, target: Slot, finite: FiniteCheck
) -> None:
    for block in source.blocks(reader.dtype(source.path).itemsize):
        # A layer is one block and may have another index in the stacks of the sparse model. A
        # parameter with several blocks is not stacked, so its blocks have the same indices.
        index = target.index if source.index else block
        array = reader.read(source.path, block)
        finite.add(path, array)
        writer.write(target.path, index, array)


def _read_mlp(
    reader: Reader, dense_slots: dict[str, Slot], layer: int, finite: FiniteCheck
) -> dict[str, Any]:
    """Reads the parameters of a dense feed-forward layer."""
    prefix = f"decoder/layers/{layer}/mlp/"
    mlp = {}
    for path, slot in dense_slots.items():
        if path.startswith(prefix):
            array = reader.read(slot.path, slot.index)
            finite.add(path, array)
            mlp[path.removeprefix(prefix)] = jnp.asarray(array)
    return unflatten(mlp)
