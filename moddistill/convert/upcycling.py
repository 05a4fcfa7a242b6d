"""Dense model folder to sparse one, layer by layer, without holding either in memory."""

import dataclasses
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from moddistill.config import ExpertConfig, UpcycleConfig
from moddistill.convert.chat_template import FILE
from moddistill.convert.extras import POOLING
from moddistill.convert.finite import FiniteCheck
from moddistill.convert.importing import array_specs
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

_expert = jax.jit(upcycle_expert, static_argnames=("moe", "how"))


def upcycle_model(
    model: Path,
    out: Path,
    moe: ExpertConfig,
    how: UpcycleConfig = COPY,
    *,
    seed: int = 0,
    overwrite: bool = False,
) -> ModelConfig:
    """Writes the sparse form of a dense model folder and returns its architecture.

    Raises:
      UserError: if the model is sparse already, or `moe` or `how` does not fit it.
    """
    given, model = model, as_model_folder(model)
    dense = read_model_config(model)
    sparse = upcycle_config(dense, moe)
    check_upcycle(how)
    reader = Reader(model / "params")
    reader.check(dense)
    before, after = slots(dense), slots(sparse)
    finite = FiniteCheck(str(given))
    with write_folder(out, "upcycle", overwrite, inputs=(given, model)) as tmp_dir:
        kept = {path: reader.dtype(before[path].path) for path in before}
        dtypes = {slot.path: _dtype(path, kept) for path, slot in after.items()}
        with Writer(tmp_dir / "params", array_specs(sparse, dtypes)) as writer:
            same = sorted(before.keys() & after.keys(), key=before.get)
            for path in tqdm(same, desc="copy", unit="array"):
                _copy(path, reader, before[path], writer, after[path], finite)
            key = jax.random.key(seed)
            for layer in tqdm(sparse.decoder.moe_layers, desc="upcycle", unit="layer"):
                rng = jax.random.fold_in(key, layer)
                mlp = _read_mlp(reader, before, layer, finite)
                prefix = f"decoder/layers/{layer}/moe/"
                for name, array in flatten(upcycle_router(mlp, sparse.decoder.moe, rng)).items():
                    _write(writer, after[prefix + name], array)
                for number in range(sparse.decoder.moe.num_experts):
                    expert = _expert(mlp, sparse.decoder.moe, how, rng, number)
                    for name, array in expert.items():
                        _write(writer, after[f"{prefix}{name}/{number}"], array)
        finite.close()
        source = {"upcycled": {"from": str(model), "seed": seed} | dataclasses.asdict(how)}
        source |= {key: value for key, value in read_source(model).items() if key == "imported"}
        write_description(tmp_dir, sparse, load_tokenizer(str(model)), source)
        for name in (POOLING, FILE):
            if (model / name).is_file():
                shutil.copy(model / name, tmp_dir)
    return sparse


def _dtype(path: str, kept: dict[str, np.dtype]) -> np.dtype:
    """Experts have that of the layer they are copies of; routers are float32."""
    if path in kept:
        return kept[path]
    dense = re.sub(r"/moe/experts_(\w+)/\d+$", r"/mlp/\1/kernel", path)
    dense = re.sub(r"/moe/residual/", "/mlp/", dense)
    return kept.get(dense, np.dtype(np.float32))


def _copy(
    path: str, reader: Reader, source: Slot, writer: Writer, target: Slot, finite: FiniteCheck
) -> None:
    for part in source.parts(reader.dtype(source.path).itemsize):
        # Layers move to another place in their stack; large matrices are in none.
        index = target.index if source.index else part
        array = reader.read(source.path, part)
        finite.add(path, array)
        writer.write(target.path, index, array)


def _read_mlp(reader: Reader, places: dict[str, Slot], layer: int, finite: FiniteCheck) -> dict:
    prefix = f"decoder/layers/{layer}/mlp/"
    found = {}
    for path, slot in places.items():
        if path.startswith(prefix):
            array = reader.read(slot.path, slot.index)
            finite.add(path, array)
            found[path.removeprefix(prefix)] = jnp.asarray(array)
    return unflatten(found)


def _write(writer: Writer, place: Slot, array: jax.Array) -> None:
    writer.write(place.path, place.index, np.asarray(array))
