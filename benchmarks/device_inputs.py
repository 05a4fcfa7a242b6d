"""Inputs of `benchmarks.device`: a mesh of one device, random parameters, states and batches."""

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from moddistill.config import MeshConfig, TrainConfig
from moddistill.distributed import sharding
from moddistill.models.batch import Batch, PreferenceBatch, padded_batch
from moddistill.models.vlm import ModelConfig
from moddistill.planning.planner import abstract_batch
from moddistill.training.program import SUPERVISED_SHARE
from moddistill.training.state import State

_ACCELERATOR = threading.Lock()


def say(message: str) -> None:
    """Prints progress to stderr, since stdout is for the table."""
    print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def on(device: Any, precision: str | None = None) -> Iterator[Mesh]:
    """Enters a mesh of one device.

    Threads take turns on an accelerator: CUDA graph capture in one thread fails while another
    allocates or autotunes.

    Args:
      precision: precision of float32 matmuls.
    """
    turn = contextlib.nullcontext() if device.platform == "cpu" else _ACCELERATOR
    mesh = sharding.make_mesh(MeshConfig(), [device])
    matmuls = jax.default_matmul_precision(precision)
    rules = nn.logical_axis_rules(tuple(sharding.RULES.items()))
    with turn, jax.default_device(device), jax.set_mesh(mesh), rules, matmuls:
        yield mesh


def random_leaves(shapes: Any, seed: int) -> Any:
    """Returns random parameters with the shapes, dtypes and shardings of `shapes`.

    Norm scales are 1, biases 0, all others normal with standard deviation 0.02. Leaves are
    initialised one by one in their own dtype: a 7B model in float32 would take twice the memory.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    arrays = []
    for number, (path, x) in enumerate(leaves):
        kind = str(path[-1].key).rsplit("/", 1)[-1]
        make = _initializer(kind, x.shape, jnp.dtype(x.dtype), x.sharding)
        arrays.append(make(jax.random.fold_in(jax.random.key(seed), number)))
    return jax.tree_util.tree_unflatten(structure, arrays)


@functools.cache  # layers share shapes
def _initializer(kind: str, shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    def make(rng: jax.Array) -> jax.Array:
        if kind in ("scale", "bias"):
            return jnp.full(shape, float(kind == "scale"), dtype)
        return (0.02 * jax.random.normal(rng, shape, dtype)).astype(dtype)

    return jax.jit(make, out_shardings=sharding)


def random_state(shapes: State, seed: int) -> State:
    """Returns the state before the first step, with random parameters; `shapes` have shardings."""

    def zeros(x: Any) -> jax.Array:
        return jnp.zeros(x.shape, x.dtype, device=x.sharding)

    empty = jax.tree.map(zeros, (shapes.step, shapes.opt_state, shapes.mean_loss))
    params = random_leaves({"params": shapes.params, "frozen": shapes.frozen}, seed)
    return State(empty[0], params["params"], params["frozen"], empty[1], empty[2])


def random_batch(config: TrainConfig, student: ModelConfig, mesh: Mesh, full: bool) -> Any:
    """Returns random tokens and images as numpy arrays; each sample ends with supervised tokens.

    With packing, rows are full: as many samples of equal length as a row has slots for images.

    Args:
      full: rows without padding, as `full_step_size` counts them, or of random lengths.
    """
    rng = np.random.default_rng(0)

    shapes = abstract_batch(config, student, mesh)
    if isinstance(shapes, PreferenceBatch):
        sides = (_rows(student, *side.tokens.shape, full, rng) for side in shapes[:2])
        batch = PreferenceBatch(*sides)
    elif config.data.packing:
        batch = _packed_rows(student, *shapes.tokens.shape, shapes.images.shape[1], rng)
    else:
        batch = _rows(student, *shapes.tokens.shape, full, rng)
    if shapes.images is None:
        return batch
    return batch._replace(images=rng.integers(0, 256, shapes.images.shape, np.uint8))


def _rows(
    student: ModelConfig, rows: int, length: int, full: bool, rng: np.random.Generator
) -> Batch:
    patches = student.vision.patches if student.vision else 0
    answer = round(length * SUPERVISED_SHARE)
    tokens = rng.integers(0, student.decoder.real_ids[-1][1], (rows, length), np.int32)
    tokens[:, 1 : 1 + patches] = student.image_token_id
    shortest = length if full else 1 + patches + answer
    ends = rng.integers(shortest, length + 1, (rows, 1))
    place = np.arange(length)[None]
    loss_mask = (place < ends) & (place >= ends - answer)
    return padded_batch(tokens, ends[:, 0], loss_mask)


def _packed_rows(
    student: ModelConfig, rows: int, length: int, samples: int, rng: np.random.Generator
) -> Batch:
    patches, answer = student.vision.patches, round(length * SUPERVISED_SHARE / samples)
    slots = np.arange(length)
    # The last sample also takes what an equal division leaves.
    number = np.minimum(slots // (length // samples), samples - 1)
    starts = np.searchsorted(number, np.arange(samples + 1))
    positions = slots - starts[number]
    tokens = rng.integers(0, student.decoder.real_ids[-1][1], (rows, length), np.int32)
    tokens[:, (positions >= 1) & (positions <= patches)] = student.image_token_id
    supervised = slots >= starts[number + 1] - answer
    fields = (positions.astype(np.int32), number.astype(np.int32) + 1, supervised)
    return Batch(tokens, *(np.tile(x, (rows, 1)) for x in fields))
