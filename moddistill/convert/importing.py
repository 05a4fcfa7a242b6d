"""Hugging Face weights in: a model folder from one checkpoint, or from its parts."""

import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from moddistill.config import TEMPLATES
from moddistill.convert.extras import copy_chat_template, copy_pooling_head, import_record
from moddistill.convert.families import llava
from moddistill.convert.finite import FiniteCheck, is_finite
from moddistill.convert.hub import local_folder
from moddistill.convert.image_row import pad_rows, with_image_row
from moddistill.convert.rules import (
    Index,
    MappedTensor,
    check_matches_config,
    mapped_tensors,
    param_dtypes,
    prefixed,
    slots,
)
from moddistill.convert.sources import Source, open_source
from moddistill.distributed.sharding import unbox
from moddistill.errors import UserError
from moddistill.models.vlm import ModelConfig, abstract_params
from moddistill.params import flatten
from moddistill.storage.atomic_dir import write_folder
from moddistill.storage.model_folder import write_description
from moddistill.storage.orbax_layout import Writer
from moddistill.storage.shards import read_file
from moddistill.storage.tensor import Tensor, check_weights, some_of

Assignments = list[tuple[MappedTensor, Tensor]]


def import_model(
    name: str,
    out: Path,
    *,
    vision: str = "",
    projector: str = "",
    template: str = "",
    select_layer: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> ModelConfig:
    """Writes a model folder from a Hugging Face folder or hub name; returns the architecture.

    Args:
      vision: where a language model gets its tower from.
      projector: file of a trained projector; without one it gets new weights from `seed`.
      template: conversation format; that of the source's family if empty.

    Raises:
      UserError: for parts that are missing, doubled or do not fit, with everything that is wrong.
    """
    sources = [open_source(local_folder(name), select_layer)]
    if select_layer is not None and not vision and sources[0].vision is None:
        raise UserError(f"--select_layer is {select_layer}, but there is no tower")
    if sources[0].decoder is None:
        raise UserError(f"{name!r} is a vision tower; give it as --vision beside a language model")
    if vision:
        layer = sources[0].select_layer if select_layer is None else select_layer
        sources.append(_tower(vision, sources[0], layer))
    config = _architecture(sources, template, projector)
    placed = _assign_all(sources, config, projector)
    read = [source.folder for source in sources] + ([Path(projector)] if projector else [])
    fresh = _new_projector(config, placed, seed)
    description = {"imported": import_record(sources, config, sorted(fresh))}
    with write_folder(out, "import", overwrite, inputs=read) as tmp_dir:
        # Of a language model alone, a template has no place for pictures; the original code's
        # checkpoints bring one that they were not trained with.
        if len(sources) == 1 and sources[0].template == config.template == "chatml":
            copy_chat_template(sources[0].folder, tmp_dir)
        weights = _write_params(tmp_dir / "params", config, placed, fresh)
        description["imported"]["weights"] = weights
        copy_pooling_head(sources[-1], tmp_dir)
        write_description(tmp_dir, config, sources[0].tokenizer, description)
    return config


def _tower(name: str, language: Source, select_layer: int | None) -> Source:
    source = open_source(local_folder(name), select_layer)
    if source.vision is None or source.decoder is not None:
        raise UserError(f"{name!r} is no vision tower alone; accepted: a CLIP or SigLIP model")
    if language.vision is not None:
        raise UserError(f"{str(language.folder)!r} brings its own tower; --vision is not needed")
    return source


def _architecture(sources: Sequence[Source], template: str, projector: str) -> ModelConfig:
    language = sources[0]
    vision = sources[-1].vision
    kind = language.projector or "mlp2x_gelu"
    if language.projector and projector:
        raise UserError(
            f"{str(language.folder)!r} brings its own projector; --projector is not needed"
        )
    if vision is None and (language.projector or projector):
        raise UserError(
            f"there is a projector, but no tower in {str(language.folder)!r}; accepted: the one it "
            "was trained with, as --vision"
        )
    if template and template not in TEMPLATES:
        raise UserError(f"template {template!r} is unknown; accepted: {', '.join(TEMPLATES)}")
    return with_image_row(
        ModelConfig(
            language.decoder,
            vision,
            kind,
            template or language.template,
            language.tokenizer.image_id,
        )
    )


def _assign_all(sources: Sequence[Source], config: ModelConfig, projector: str) -> Assignments:
    """All arrays of all parts; one UserError with what is wrong with any of them."""
    placed, wrong = [], []
    steps = [functools.partial(assign_tensors, source, config) for source in sources]
    if projector:
        steps.append(functools.partial(_assign_projector, Path(projector), config))
    for step in steps:
        try:
            placed += step()
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("\n".join(wrong))
    if len(sources) == 2:
        _check_tower(*sources)
    return placed


def _check_tower(language: Source, tower: Source) -> None:
    """Raises UserError if the language model's checkpoint has another tower than the one given.

    Code of LLaVA saves its tower along, under one more name for every module around it.
    """
    around = r"model\.(vision|image)_tower\.(\w+_tower\.)*"
    for name, tensor in language.checkpoint.items():
        inner = re.sub(around, "", name)
        if inner == name or re.fullmatch("|".join(tower.ignored), inner):
            continue
        given = tower.checkpoint.get(inner) or tower.checkpoint.get(
            inner.removeprefix("vision_model.")
        )
        if given is None or not _is_cast_of(tensor, given):
            raise UserError(
                f"{language.folder} has a tower of its own, whose {name} is not that of "
                f"{tower.folder}; accepted: the tower it was trained with, as --vision"
            )


def _is_cast_of(tensor: Tensor, given: Tensor) -> bool:
    """Whether it is the given one in its own dtype, to which a trainer may have cast its tower."""
    with np.errstate(over="ignore"):
        return np.array_equal(tensor.read(), given.read().astype(tensor.dtype))


def assign_tensors(source: Source, config: ModelConfig) -> Assignments:
    """The arrays of a source's parts and where their bytes are.

    Raises:
      UserError: listing every one that is missing, unexpected or of another shape.
    """
    found = mapped_tensors(config, source.rules, source.parts)
    pooling = [name for name in source.checkpoint if _is_pooling(name, source)]
    read = [*(piece.name for piece in found), *pooling]
    check_weights(read, source.checkpoint, str(source.folder))
    ignored = [*source.ignored, *filter(None, (source.zero, source.tied))]
    ignored += [re.escape(source.pooling) + ".*"] if source.pooling else []
    names = {piece.name for piece in found}
    rows = source.decoder.vocab_size if source.decoder else 0
    checkpoint = pad_rows(source.checkpoint, found, rows)
    check_matches_config(found, checkpoint, ignored, str(source.folder))
    finite = FiniteCheck(str(source.folder))
    for name, tensor in source.checkpoint.items():
        if source.zero and re.fullmatch(source.zero, name) and np.any(tensor.read()):
            raise UserError(f"{source.folder}: {name} is not zero; its expert is not built here")
    for name in pooling:
        finite.add(name, source.checkpoint[name].read())
    finite.close()
    if source.tied in source.checkpoint and source.tied not in names:
        _check_tied(source, found)
    return [(piece, checkpoint[piece.name]) for piece in found]


def _is_pooling(name: str, source: Source) -> bool:
    """Whether a tensor is of the pooling head, which is carried along."""
    return bool(source.pooling) and name.startswith(source.pooling)


def _check_tied(source: Source, found: Sequence[MappedTensor]) -> None:
    [table] = [piece.name for piece in found if piece.slot.path == "decoder/embedding"]
    head, embedding = (source.checkpoint[name].read() for name in (source.tied, table))
    # Values that are not finite are reported when the tensor is copied.
    if not np.array_equal(head, embedding) and is_finite(head):
        raise UserError(
            f"{source.folder}: {source.tied} differs from {table}, but the config ties them"
        )


def _assign_projector(file: Path, config: ModelConfig) -> Assignments:
    """A projector saved by itself, under any of the names the original code gives it."""
    if not file.is_file():
        raise UserError(f"{str(file)!r} is no file; accepted: mm_projector.bin or safetensors")
    checkpoint = read_file(file)
    pattern = r"(model\.)?(mm_projector\.)?(image_spatial_proj\.)?"
    prefixes = sorted({re.match(pattern, name)[0] for name in checkpoint})
    if len(prefixes) != 1:
        names = some_of(sorted(checkpoint)) or "none"
        raise UserError(f"{file}: its tensors are {names}; accepted: those of one projector")
    rules = prefixed(llava.original_projector(config.projector), prefixes[0])
    found = mapped_tensors(config, rules, ("projector",))
    check_weights([piece.name for piece in found], checkpoint, str(file))
    check_matches_config(found, checkpoint, (), str(file))
    return [(piece, checkpoint[piece.name]) for piece in found]


def _new_projector(config: ModelConfig, placed: Assignments, seed: int) -> dict[str, np.ndarray]:
    """Weights of a projector that no source has: normal by fan-in, biases zero."""
    if config.vision is None or any(
        piece.slot.path.startswith("projector/") for piece, _ in placed
    ):
        return {}
    rng = np.random.default_rng(seed)
    fresh = {}
    for path, slot in slots(config).items():
        if path.startswith("projector/"):
            scale = slot.shape[0] ** -0.5 if len(slot.shape) == 2 else 0.0
            fresh[path] = (scale * rng.standard_normal(slot.shape)).astype(np.float32)
    return fresh


def _write_params(
    folder: Path, config: ModelConfig, placed: Assignments, fresh: dict[str, np.ndarray]
) -> str:
    """Writes all arrays; returns the SHA-256 of their names and bytes in the order of the files."""
    digest = hashlib.sha256()
    found = [piece for piece, _ in placed]
    dtypes = param_dtypes(found, {piece.name: tensor for piece, tensor in placed})
    dtypes |= {path: array.dtype for path, array in fresh.items()}
    finite = FiniteCheck(", ".join(sorted({str(tensor.file.parent) for _, tensor in placed})))
    with Writer(folder, array_specs(config, dtypes)) as writer:
        for path, array in fresh.items():
            writer.write(path, (), array)
            _add_array(digest, path, array)
        for piece, tensor in _with_progress(placed):
            for index, rows in piece.parts(tensor.dtype.itemsize):
                array = (tensor if rows == slice(None) else tensor.rows(rows)).read()
                finite.add(piece.name, array)
                _add_array(digest, piece.name, array)
                _move(piece, array, rows, writer, index)
    finite.close()
    return digest.hexdigest()


def _add_array(digest: "hashlib._Hash", name: str, array: np.ndarray) -> None:
    digest.update(f"{name} {array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)


def _move(
    piece: MappedTensor, array: np.ndarray, rows: slice, writer: Writer, index: Index
) -> None:
    shape = list(piece.slot.shape)
    if rows != slice(None):
        shape[piece.transform.rows] = len(array)
    writer.write(piece.slot.path, index, piece.transform.inward(array, tuple(shape)))


def array_specs(
    config: ModelConfig, dtypes: dict[str, np.dtype]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter of a model."""
    shapes = flatten(unbox(abstract_params(config)))
    return {path: jax.ShapeDtypeStruct(x.shape, dtypes[path]) for path, x in shapes.items()}


def _with_progress(placed: Assignments) -> Iterator[tuple[MappedTensor, Tensor]]:
    """In the order of the files, with a bar of bytes."""
    total = sum(tensor.nbytes for _, tensor in placed)
    with tqdm(total=total, unit="B", unit_scale=True, desc="convert", mininterval=0.5) as bar:
        for piece, tensor in sorted(placed, key=lambda pair: (pair[1].file, pair[1].offset)):
            yield piece, tensor
            bar.update(tensor.nbytes)
