"""How names and arrays of a checkpoint map to parameters: tables of rules, read in both directions.

A rule is a name in the checkpoint, a path here and a transform. Paths number layers one by one, as
checkpoints do; where a layer lies in the stacks of the layer plan is looked up in `slots`. Import
and export walk over the same pieces, so what one does the other undoes.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from moddistill.distributed.sharding import unbox
from moddistill.errors import UserError
from moddistill.models.layer_plan import layer_index
from moddistill.models.vlm import ModelConfig, abstract_params
from moddistill.params import flatten
from moddistill.storage.orbax_layout import blocks
from moddistill.storage.tensor import Checkpoint

_MOST_LINES = 100  # of tensors that do not fit

Shape = tuple[int, ...]
Index = tuple[int | slice, ...]


class Transform(NamedTuple):
    """What happens to an array on its way.

    Attributes:
      rows: axis of a matrix here that is the checkpoint's first; large ones are moved in parts.
      shape: from the shape here to that in the checkpoint.
      inward: from the checkpoint's array and the shape here to the array here.
      outward: from the array here and the checkpoint's shape to its array.
    """

    shape: Callable[[Shape], Shape]
    inward: Callable[[np.ndarray, Shape], np.ndarray]
    outward: Callable[[np.ndarray, Shape], np.ndarray]
    rows: int | None = None


IDENTITY = Transform(lambda shape: shape, lambda x, _: x, lambda x, _: x, rows=0)
# A vector that is kept by heads here.
FLATTEN = Transform(
    lambda shape: (math.prod(shape),),
    lambda x, shape: x.reshape(shape),
    lambda x, shape: x.reshape(shape),
)


def linear_kernel(inputs: int = 1) -> Transform:
    """Torch's [outputs, inputs] to a kernel [*inputs, *outputs] of `inputs` input axes."""
    return Transform(
        lambda shape: (math.prod(shape[inputs:]), math.prod(shape[:inputs])),
        lambda x, shape: x.T.reshape(shape),
        lambda x, shape: x.reshape(shape[::-1]).T,
        rows=inputs,
    )


# Torch's convolution [outputs, 3, p, p] to a kernel [p * p * 3, outputs] over flattened patches.
PATCH_KERNEL = Transform(
    lambda shape: (shape[1], 3, math.isqrt(shape[0] // 3), math.isqrt(shape[0] // 3)),
    lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape),
    lambda x, shape: x.reshape(*shape[2:], 3, shape[0]).transpose(3, 2, 0, 1),
)


class Rule(NamedTuple):
    """`{layer}` and `{expert}` stand for numbers, the same ones on both sides."""

    name: str
    path: str
    transform: Transform = IDENTITY


Rules = tuple[Rule, ...]


def prefixed(rules: Iterable[Rule], prefix: str) -> Rules:
    """The rules of a part, under the name it has in a whole."""
    return tuple(rule._replace(name=prefix + rule.name) for rule in rules)


class Slot(NamedTuple):
    """A place for one array: a slice of a parameter."""

    path: str
    index: Shape
    shape: Shape

    def parts(self, itemsize: int) -> list[Index]:
        """Where its blocks lie in the parameter: a large matrix has several."""
        if self.index or len(self.shape) != 2:
            return [self.index]
        axis, cuts = blocks(self.shape, itemsize)
        return [(slice(None),) * axis + (cut,) for cut in cuts]


@dataclasses.dataclass(frozen=True)
class MappedTensor:
    """One array of a checkpoint and its slot."""

    name: str
    slot: Slot
    transform: Transform

    @property
    def shape(self) -> Shape:
        """The array's shape in the checkpoint."""
        return self.transform.shape(self.slot.shape)

    def parts(self, itemsize: int) -> list[tuple[Index, slice]]:
        """Where each block of the parameter lies there, and its rows in the checkpoint."""
        parts = self.slot.parts(itemsize)
        if len(parts) == 1 or len(parts[0]) - 1 != self.transform.rows:
            return [(self.slot.index, slice(None))]
        return [(part, part[-1]) for part in parts]


def slots(config: ModelConfig) -> dict[str, Slot]:
    """All places of a model by path; layers are numbered, experts stand behind their array."""
    found = {}
    for path, leaf in flatten(unbox(abstract_params(config))).items():
        for name, slot in _layers_of(path, leaf.shape, config):
            if "/moe/experts_" not in name:
                found[name] = slot
                continue
            for expert in range(slot.shape[0]):
                index = (*slot.index, expert)
                found[f"{name}/{expert}"] = Slot(path, index, slot.shape[1:])
    return found


def _layers_of(path: str, shape: Shape, config: ModelConfig) -> Iterable[tuple[str, Slot]]:
    stacked = re.fullmatch(r"decoder/segment_(\d+)/block_(\d+)/(.*)", path)
    tower = re.fullmatch(r"vision/(layers|unused)/(.*)", path)
    if not stacked and not tower:
        return [(path, Slot(path, (), shape))]
    if stacked:
        segment, block = int(stacked[1]), int(stacked[2])
        first, step = layer_index(config.decoder.plan, segment, block)
        part, rest = "decoder", stacked[3]
    else:
        first, step = (0 if tower[1] == "layers" else config.vision.used_layers), 1
        part, rest = "vision", tower[2]
    return [
        (f"{part}/layers/{first + step * i}/{rest}", Slot(path, (i,), shape[1:]))
        for i in range(shape[0])
    ]


def mapped_tensors(
    config: ModelConfig, rules: Rules, parts: Sequence[str] = ("decoder", "vision", "projector")
) -> list[MappedTensor]:
    """The arrays that a model of this architecture has in a checkpoint with these rules.

    Args:
      parts: first path components of the parameters that are meant.

    Raises:
      UserError: naming the parameters that the format has no place for.
    """
    patterns = [(re.compile(pattern(rule.path)), rule) for rule in rules]
    found, without = [], []
    for path, slot in slots(config).items():
        if path.split("/")[0] not in parts:
            continue
        hits = [(match, rule) for name, rule in patterns if (match := name.fullmatch(path))]
        if not hits:
            without.append(path)
            continue
        [(match, rule)] = hits
        found.append(MappedTensor(rule.name.format(**match.groupdict()), slot, rule.transform))
    if without:
        raise UserError(
            f"this format has no place for {len(without)} parameters of the model, such as "
            f"{without[0]!r}"
        )
    return found


def pattern(path: str) -> str:
    """The regular expression of a rule's name or path."""
    return re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(path))


def check_matches_config(
    wanted: Sequence[MappedTensor], checkpoint: Checkpoint, ignored: Sequence[str], origin: str
) -> None:
    """Raises one UserError that lists every missing, unexpected and misshapen tensor.

    Args:
      ignored: patterns of names that may be there and are not read.
    """
    expected = {piece.name: piece.shape for piece in wanted}
    lines = [
        f"missing {name} {expected[name]}" for name in sorted(expected.keys() - checkpoint.keys())
    ]
    unexpected = sorted(
        name
        for name in checkpoint.keys() - expected.keys()
        if not any(re.fullmatch(pattern, name) for pattern in ignored)
    )
    lines += [f"unexpected {name} {checkpoint[name].shape}" for name in unexpected]
    lines += [
        f"{name} has shape {checkpoint[name].shape}, expected {expected[name]}"
        for name in sorted(expected.keys() & checkpoint.keys())
        if checkpoint[name].shape != expected[name]
    ]
    if lines:
        more = len(lines) - _MOST_LINES
        shown = lines[:_MOST_LINES] + ([f"and {more:,} more"] if more > 0 else [])
        raise UserError(
            f"{origin}: {len(lines)} tensors do not fit the architecture its config.json states:\n"
            "  " + "\n  ".join(line[:500] for line in shown)
        )


def param_dtypes(wanted: Sequence[MappedTensor], checkpoint: Checkpoint) -> dict[str, np.dtype]:
    """The stored dtype of each parameter; UserError if its slices differ in it."""
    found: dict[str, tuple[str, np.dtype]] = {}
    for piece in wanted:
        dtype = checkpoint[piece.name].dtype
        name, other = found.setdefault(piece.slot.path, (piece.name, dtype))
        if other != dtype:
            raise UserError(
                f"{piece.name} is {dtype}, {name} is {other}; accepted: one dtype for all layers"
            )
    return {path: dtype for path, (_, dtype) in found.items()}
