"""Assignment of a checkpoint's tensors to parameters, with checks of all tensors that it has."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moddistill.convert.families import llava
from moddistill.convert.finite import FiniteCheck, is_finite
from moddistill.convert.image_row import pad_rows
from moddistill.convert.rules import (
    MappedTensor,
    check_matches_config,
    mapped_tensors,
    prefixed,
    slots,
)
from moddistill.convert.sources import Source
from moddistill.errors import UserError, invalid
from moddistill.models.vlm import ModelConfig
from moddistill.storage.shards import read_file
from moddistill.storage.tensor import Tensor, check_weights, some_of

Assignments = list[tuple[MappedTensor, Tensor]]  # the tensor may be padded, see `pad_rows`


def assign_tensors(source: Source, config: ModelConfig) -> Assignments:
    """Assigns each parameter of a source's parts its tensor, and checks what is not copied.

    Raises:
      UserError: listing all missing, unexpected and misshapen tensors; a shared expert that is not
        zero; a head that differs from the embedding it is tied to.
    """
    mapped = mapped_tensors(config, source.rules, source.parts)
    names = {tensor.name for tensor in mapped}
    pooling = [name for name in source.checkpoint if _is_pooling(name, source)]
    check_weights(
        [*(tensor.name for tensor in mapped), *pooling], source.checkpoint, str(source.folder)
    )
    # Tensors that must be zero, tied or of the pooling head are not mapped, but checked below.
    ignored = [*source.ignored, *filter(None, (source.zero, source.tied))]
    ignored += [re.escape(source.pooling) + ".*"] if source.pooling else []
    rows = source.decoder.vocab_size if source.decoder else 0
    checkpoint = pad_rows(source.checkpoint, mapped, rows)
    check_matches_config(mapped, checkpoint, ignored, str(source.folder))
    finite = FiniteCheck(str(source.folder))
    for name, tensor in source.checkpoint.items():
        if source.zero and re.fullmatch(source.zero, name) and np.any(tensor.read()):
            raise UserError(
                f"{source.folder}: expected zeros in {name}, as shared experts are not supported, "
                "got other weights"
            )
    for name in pooling:
        finite.add(name, source.checkpoint[name].read())
    finite.close()
    if source.tied in source.checkpoint and source.tied not in names:
        _check_tied(source, mapped)
    return [(tensor, checkpoint[tensor.name]) for tensor in mapped]


def _is_pooling(name: str, source: Source) -> bool:
    """Returns True for tensors of SigLIP's pooling head, which are copied for the export."""
    return bool(source.pooling) and name.startswith(source.pooling)


def _check_tied(source: Source, mapped: Sequence[MappedTensor]) -> None:
    [table] = [tensor.name for tensor in mapped if tensor.slot.path == "decoder/embedding"]
    head, embedding = (source.checkpoint[name].read() for name in (source.tied, table))
    # NaN differs from itself; non-finite values get their own error when the tensor is copied.
    if not np.array_equal(head, embedding) and is_finite(head):
        raise UserError(
            f"{source.folder}: expected {source.tied} equal to {table}, as the config ties them, "
            "got other values"
        )


def assign_projector(file: Path, config: ModelConfig) -> Assignments:
    """Assigns the tensors of a projector in a file of its own.

    The original code saves `model.mm_projector.0.weight` or parts of this name.
    """
    if not file.is_file():
        raise invalid("--projector", str(file), "an existing mm_projector.bin or safetensors file")
    checkpoint = read_file(file)
    pattern = r"(model\.)?(mm_projector\.)?(image_spatial_proj\.)?"
    prefixes = sorted({re.match(pattern, name)[0] for name in checkpoint})
    if len(prefixes) != 1:
        names = some_of(sorted(checkpoint)) or "none"
        raise UserError(f"{file}: expected the tensors of one projector, got {names}")
    rules = prefixed(llava.original_projector(config.projector), prefixes[0])
    mapped = mapped_tensors(config, rules, ("projector",))
    check_weights([tensor.name for tensor in mapped], checkpoint, str(file))
    check_matches_config(mapped, checkpoint, (), str(file))
    return [(tensor, checkpoint[tensor.name]) for tensor in mapped]


def init_projector(
    config: ModelConfig, assignments: Assignments, seed: int
) -> dict[str, np.ndarray]:
    """Initialises a projector that no source has: normal with variance 1 / fan-in, zero biases."""
    has_projector = any(mapped.slot.path.startswith("projector/") for mapped, _ in assignments)
    if config.vision is None or has_projector:
        return {}
    rng = np.random.default_rng(seed)
    arrays = {}
    for path, slot in slots(config).items():
        if path.startswith("projector/"):
            scale = slot.shape[0] ** -0.5 if len(slot.shape) == 2 else 0.0
            arrays[path] = (scale * rng.standard_normal(slot.shape)).astype(np.float32)
    return arrays
