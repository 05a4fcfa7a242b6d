"""Import of Hugging Face weights: a model folder from one checkpoint, or from its parts.

A language model, a vision tower and a projector may come from three places. Tensors are streamed
from file to file, with at most one in memory.
"""

import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from moddistill.config import TEMPLATES
from moddistill.convert.assignments import (
    Assignments,
    assign_projector,
    assign_tensors,
    init_projector,
)
from moddistill.convert.extras import copy_chat_template, copy_pooling_head, import_record
from moddistill.convert.finite import FiniteCheck
from moddistill.convert.hub import local_folder
from moddistill.convert.image_row import with_image_row
from moddistill.convert.rules import (
    Index,
    MappedTensor,
    param_dtypes,
)
from moddistill.convert.sources import Source, open_source
from moddistill.distributed.sharding import unbox
from moddistill.errors import UserError, invalid, not_one_of
from moddistill.models.vlm import ModelConfig, abstract_params
from moddistill.params import flatten
from moddistill.storage.atomic_dir import write_folder
from moddistill.storage.model_folder import write_description
from moddistill.storage.orbax_layout import Writer
from moddistill.storage.tensor import Tensor


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
      vision: folder or hub name of a vision tower for a language model.
      projector: file of a trained projector; if empty, and the model has none, it is initialised
        from `seed`.
      template: conversation template; that of the source if empty.
      select_layer: hidden state of the vision tower, counted from the end; that of the source's
        config if None.

    Raises:
      UserError: missing, superfluous or mismatched parts; lists all mismatched tensors.
    """
    sources = [open_source(local_folder(name), select_layer)]
    if select_layer is not None and not vision and sources[0].vision is None:
        raise invalid("--select_layer", select_layer, "none for a model without a vision tower")
    if sources[0].decoder is None:
        raise invalid("--hf", name, "a language model; a vision tower is passed as --vision")
    if vision:
        layer = sources[0].select_layer if select_layer is None else select_layer
        sources.append(_tower(vision, sources[0], layer))
    config = _architecture(sources, template, projector)
    assignments = _assign_all(sources, config, projector)
    inputs = [source.folder for source in sources] + ([Path(projector)] if projector else [])
    initialized = init_projector(config, assignments, seed)
    description = {"imported": import_record(sources, config, sorted(initialized))}
    with write_folder(out, "import", overwrite, inputs=inputs) as tmp_dir:
        # The chat template of a language model cannot render images, so it is copied only if no
        # vision tower is added. Checkpoints of the original code (template vicuna) contain one
        # that they were not trained with.
        if len(sources) == 1 and sources[0].template == config.template == "chatml":
            copy_chat_template(sources[0].folder, tmp_dir)
        weights = _write_params(tmp_dir / "params", config, assignments, initialized)
        description["imported"]["weights"] = weights
        copy_pooling_head(sources[-1], tmp_dir)
        write_description(tmp_dir, config, sources[0].tokenizer, description)
    return config


def _tower(name: str, language: Source, select_layer: int | None) -> Source:
    source = open_source(local_folder(name), select_layer)
    if source.vision is None or source.decoder is not None:
        raise invalid("--vision", name, "a CLIP or SigLIP model")
    if language.vision is not None:
        raise invalid("--vision", name, f"none, as {str(language.folder)!r} has a vision tower")
    return source


def _architecture(sources: Sequence[Source], template: str, projector: str) -> ModelConfig:
    language = sources[0]
    vision = sources[-1].vision
    kind = language.projector or "mlp2x_gelu"
    if language.projector and projector:
        raise invalid("--projector", projector, f"none, as {str(language.folder)!r} has one")
    if vision is None and (language.projector or projector):
        raise UserError(
            "--vision: expected the vision tower that the projector was trained with, got none, "
            f"and {str(language.folder)!r} has none"
        )
    if template and template not in TEMPLATES:
        raise not_one_of("template", template, TEMPLATES)
    return with_image_row(
        ModelConfig(
            decoder=language.decoder,
            vision=vision,
            projector=kind,
            template=template or language.template,
            image_token_id=language.tokenizer.image_id,
            context=language.context,
        )
    )


def _assign_all(sources: Sequence[Source], config: ModelConfig, projector: str) -> Assignments:
    """Assigns the tensors of all parts; raises one UserError with the messages of all parts."""
    assignments, messages = [], []
    parts = [functools.partial(assign_tensors, source, config) for source in sources]
    if projector:
        parts.append(functools.partial(assign_projector, Path(projector), config))
    for assign in parts:
        try:
            assignments += assign()
        except UserError as error:
            messages.append(str(error))
    if messages:
        raise UserError("\n".join(messages))
    if len(sources) == 2:
        _check_same_tower(*sources)
    return assignments


def _check_same_tower(language: Source, tower: Source) -> None:
    """Raises UserError if the checkpoint of the language model contains another vision tower.

    LLaVA's code saves the tower with the language model, with a prefix for each wrapping module
    (`model.vision_tower.vision_tower.`), and training may have changed it.
    """
    wrappers = r"model\.(vision|image)_tower\.(\w+_tower\.)*"
    for name, tensor in language.checkpoint.items():
        inner = re.sub(wrappers, "", name)
        if inner == name or re.fullmatch("|".join(tower.ignored), inner):
            continue
        published = tower.checkpoint.get(inner) or tower.checkpoint.get(
            inner.removeprefix("vision_model.")
        )
        if published is None or not _is_cast_of(tensor, published):
            raise UserError(
                f"--vision: expected the vision tower that {language.folder} was trained with, "
                f"which is in its checkpoint, got {tower.folder}, in which {name} differs"
            )


def _is_cast_of(tensor: Tensor, published: Tensor) -> bool:
    """Returns True if `tensor` equals `published` after the cast to its dtype, as trainers do."""
    with np.errstate(over="ignore"):
        return np.array_equal(tensor.read(), published.read().astype(tensor.dtype))


def _write_params(
    folder: Path,
    config: ModelConfig,
    assignments: Assignments,
    initialized: dict[str, np.ndarray],
) -> str:
    """Writes all parameters; returns the SHA-256 of names and bytes in the order of the files."""
    digest = hashlib.sha256()
    dtypes = param_dtypes(
        [mapped for mapped, _ in assignments],
        {mapped.name: tensor for mapped, tensor in assignments},
    )
    dtypes |= {path: array.dtype for path, array in initialized.items()}
    finite = FiniteCheck(", ".join(sorted({str(tensor.file.parent) for _, tensor in assignments})))
    with Writer(folder, array_specs(config, dtypes)) as writer:
        for path, array in initialized.items():
            writer.write(path, (), array)
            _update_digest(digest, path, array)
        for mapped, tensor in _with_progress(assignments):
            for index, rows in mapped.blocks(tensor.dtype.itemsize):
                array = (tensor if rows == slice(None) else tensor.rows(rows)).read()
                finite.add(mapped.name, array)
                # Over the tensors as the source stores them, before their transform.
                _update_digest(digest, mapped.name, array)
                _write_block(writer, mapped, array, rows, index)
    finite.close()
    return digest.hexdigest()


def _update_digest(digest: "hashlib._Hash", name: str, array: np.ndarray) -> None:
    digest.update(f"{name} {array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)


def _write_block(
    writer: Writer, mapped: MappedTensor, array: np.ndarray, rows: slice, index: Index
) -> None:
    """Converts rows of a tensor and writes them to their slice of the parameter."""
    shape = list(mapped.slot.shape)
    if rows != slice(None):
        shape[mapped.transform.row_axis] = len(array)
    writer.write(mapped.slot.path, index, mapped.transform.to_param(array, tuple(shape)))


def array_specs(
    config: ModelConfig, dtypes: dict[str, np.dtype]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of every parameter of a model."""
    shapes = flatten(unbox(abstract_params(config)))
    return {path: jax.ShapeDtypeStruct(x.shape, dtypes[path]) for path, x in shapes.items()}


def _with_progress(assignments: Assignments) -> Iterator[tuple[MappedTensor, Tensor]]:
    """Yields assignments in the order of the files, for sequential reads, with a progress bar."""
    total = sum(tensor.nbytes for _, tensor in assignments)
    with tqdm(total=total, unit="B", unit_scale=True, desc="convert", mininterval=0.5) as bar:
        by_offset = sorted(assignments, key=lambda pair: (pair[1].file, pair[1].offset))
        for mapped, tensor in by_offset:
            yield mapped, tensor
            bar.update(tensor.nbytes)
