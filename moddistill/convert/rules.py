"""Rules that map tensors of a checkpoint to parameters, and back.

A rule is a tensor name, a parameter path and a transform:

    Rule("layers.{layer}.mlp.up_proj.weight", "decoder/layers/{layer}/mlp/up/kernel",
         linear_kernel())

Paths of rules number the layers one by one, as checkpoints do. Parameters are stacks of layers
(`decoder/segment_0/block_1/mlp/up/kernel`); `slots` finds the slice of a layer in its stack. Import
and export iterate over the same `mapped_tensors`, so each is the inverse of the other.
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

_MOST_LINES = 100  # of mismatches in one error

Shape = tuple[int, ...]
Index = tuple[int | slice, ...]


class Transform(NamedTuple):
    """Conversion of a tensor of the checkpoint to a parameter, and back.

    Attributes:
      tensor_shape: from the shape of the parameter to that of the tensor.
      to_param: from the tensor and the shape of the parameter to the parameter.
      to_tensor: from the parameter and the shape of the tensor to the tensor.
      row_axis: axis of a parameter matrix that is the first axis of the tensor, so that rows of
        large tensors can be converted block by block; None if there is no such axis.
    """

    tensor_shape: Callable[[Shape], Shape]
    to_param: Callable[[np.ndarray, Shape], np.ndarray]
    to_tensor: Callable[[np.ndarray, Shape], np.ndarray]
    row_axis: int | None = None


IDENTITY = Transform(
    tensor_shape=lambda shape: shape,
    to_param=lambda x, _: x,
    to_tensor=lambda x, _: x,
    row_axis=0,
)
# A vector [heads * head_dim] to a parameter [heads, head_dim].
FLATTEN = Transform(
    tensor_shape=lambda shape: (math.prod(shape),),
    to_param=lambda x, shape: x.reshape(shape),
    to_tensor=lambda x, shape: x.reshape(shape),
)


def linear_kernel(inputs: int = 1) -> Transform:
    """Returns the transform of a torch linear layer [outputs, inputs] to a kernel.

    The kernel is [*inputs, *outputs]: query, key and value are [D, heads, head_dim], the attention
    output is [heads, head_dim, D].

    Args:
      inputs: number of input axes of the kernel.
    """
    # `x.T` is [inputs, outputs], which the axes of the kernel split in row-major order. Backwards
    # `shape` is that of the tensor, so `shape[::-1]` is again [inputs, outputs].
    return Transform(
        tensor_shape=lambda shape: (math.prod(shape[inputs:]), math.prod(shape[:inputs])),
        to_param=lambda x, shape: x.T.reshape(shape),
        to_tensor=lambda x, shape: x.reshape(shape[::-1]).T,
        row_axis=inputs,
    )


# A torch convolution [outputs, 3, p, p] to a kernel [p * p * 3, outputs] over patches flattened as
# (row, column, channel). A convolution with stride p is a matmul of flattened patches.
PATCH_KERNEL = Transform(
    tensor_shape=lambda shape: (shape[1], 3, math.isqrt(shape[0] // 3), math.isqrt(shape[0] // 3)),
    to_param=lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape),
    to_tensor=lambda x, shape: x.reshape(*shape[2:], 3, shape[0]).transpose(3, 2, 0, 1),
)


class Rule(NamedTuple):
    """A tensor name, a parameter path and their transform.

    `{layer}` and `{expert}` in both stand for the same numbers.
    """

    name: str
    path: str
    transform: Transform = IDENTITY


Rules = tuple[Rule, ...]


def prefixed(rules: Iterable[Rule], prefix: str) -> Rules:
    """Returns rules whose tensor names have a prefix, as those of a part of a larger model."""
    return tuple(rule._replace(name=prefix + rule.name) for rule in rules)


class Slot(NamedTuple):
    """The slice of a parameter that holds one tensor: one layer or expert of a stack, or all.

    Attributes:
      path: of the parameter.
      index: of the slice along its leading axes; empty for the entire parameter.
      shape: of the slice.
    """

    path: str
    index: Shape
    shape: Shape

    def blocks(self, itemsize: int) -> list[Index]:
        """Returns the indices of the chunks on disk; only large matrices have several."""
        if self.index or len(self.shape) != 2:
            return [self.index]
        axis, parts = blocks(self.shape, itemsize)
        return [(slice(None),) * axis + (part,) for part in parts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MappedTensor:
    """A tensor of a checkpoint, by name, and the slot of a parameter that it maps to."""

    name: str
    slot: Slot
    transform: Transform

    @property
    def shape(self) -> Shape:
        """Shape of the tensor in the checkpoint."""
        return self.transform.tensor_shape(self.slot.shape)

    def blocks(self, itemsize: int) -> list[tuple[Index, slice]]:
        """Returns (index in the parameter, rows of the tensor) for blocks that fit into memory.

        A tensor is converted block by block if the parameter is chunked along the axis that is the
        first of the tensor, and as a single block otherwise.
        """
        indices = self.slot.blocks(itemsize)
        if len(indices) == 1 or len(indices[0]) - 1 != self.transform.row_axis:
            return [(self.slot.index, slice(None))]
        return [(index, index[-1]) for index in indices]


def slots(config: ModelConfig) -> dict[str, Slot]:
    """Returns all slots of a model by rule path: `decoder/layers/3/moe/experts_up/1`."""
    by_path = {}
    for path, leaf in flatten(unbox(abstract_params(config))).items():
        for name, slot in _layer_slots(path, leaf.shape, config):
            if "/moe/experts_" not in name:
                by_path[name] = slot
                continue
            for expert in range(slot.shape[0]):
                index = (*slot.index, expert)
                by_path[f"{name}/{expert}"] = Slot(path, index, slot.shape[1:])
    return by_path


def _layer_slots(path: str, shape: Shape, config: ModelConfig) -> Iterable[tuple[str, Slot]]:
    """Returns (rule path, slot) of each layer of a stack; of a parameter outside of any, itself."""
    decoder = re.fullmatch(r"decoder/segment_(\d+)/block_(\d+)/(.*)", path)
    vision = re.fullmatch(r"vision/(layers|unused)/(.*)", path)
    if not decoder and not vision:
        return [(path, Slot(path, (), shape))]
    if decoder:
        # A segment repeats a group of blocks: element i of the stack is layer first + i * step.
        segment, block = int(decoder[1]), int(decoder[2])
        first, step = layer_index(config.decoder.plan, segment, block)
        part, rest = "decoder", decoder[3]
    else:
        # `unused` are the layers after the selected one, whose features are never computed.
        first, step = (0 if vision[1] == "layers" else config.vision.used_layers), 1
        part, rest = "vision", vision[2]
    return [
        (f"{part}/layers/{first + step * i}/{rest}", Slot(path, (i,), shape[1:]))
        for i in range(shape[0])
    ]


def mapped_tensors(
    config: ModelConfig, rules: Rules, parts: Sequence[str] = ("decoder", "vision", "projector")
) -> list[MappedTensor]:
    """Returns the tensors of a checkpoint with these rules, for a model of this architecture.

    Args:
      parts: first path components of the parameters to map.

    Raises:
      UserError: parameters without a rule, such as those of a norm that the format does not have.
    """
    patterns = [(re.compile(pattern(rule.path)), rule) for rule in rules]
    tensors, unmapped = [], []
    for path, slot in slots(config).items():
        if path.split("/")[0] not in parts:
            continue
        matches = [(match, rule) for regex, rule in patterns if (match := regex.fullmatch(path))]
        if not matches:
            unmapped.append(path)
            continue
        [(match, rule)] = matches
        name = rule.name.format(**match.groupdict())
        tensors.append(MappedTensor(name=name, slot=slot, transform=rule.transform))
    if unmapped:
        raise UserError(
            f"model: expected parameters that the format has tensors for, got {len(unmapped)} "
            f"others, such as {unmapped[0]!r}"
        )
    return tensors


def pattern(path: str) -> str:
    """Returns the regular expression of a rule's name or path, with groups for its numbers."""
    return re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(path))


def check_matches_config(
    tensors: Sequence[MappedTensor], checkpoint: Checkpoint, ignored: Sequence[str], origin: str
) -> None:
    """Raises one UserError that lists all missing, unexpected and misshapen tensors.

    Args:
      tensors: those that the architecture in the config has.
      ignored: patterns of names that may exist and are not read.
    """
    expected = {tensor.name: tensor.shape for tensor in tensors}
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


def param_dtypes(tensors: Sequence[MappedTensor], checkpoint: Checkpoint) -> dict[str, np.dtype]:
    """Returns the stored dtype of each parameter; UserError if its layers differ in dtype."""
    first: dict[str, tuple[str, np.dtype]] = {}
    for tensor in tensors:
        dtype = checkpoint[tensor.name].dtype
        name, other = first.setdefault(tensor.slot.path, (tensor.name, dtype))
        if other != dtype:
            raise UserError(
                f"{tensor.name}: expected {other}, the dtype of {name}, as layers of one stack "
                f"have one dtype, got {dtype}"
            )
    return {path: dtype for path, (_, dtype) in first.items()}
