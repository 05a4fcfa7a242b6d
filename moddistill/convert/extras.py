"""Parts and settings of a source that no parameter holds, for the export of an untrained model."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moddistill.convert.chat_template import FILE, read_chat_template
from moddistill.convert.source_settings import read_generation, replaced_image_settings
from moddistill.convert.sources import Source
from moddistill.models.vlm import ModelConfig
from moddistill.storage.safetensors import create_file, write
from moddistill.storage.tensor import TensorSpec

LOG = logging.getLogger("moddistill")
POOLING = "pooling.safetensors"  # in a model folder


def import_record(
    sources: Sequence[Source], config: ModelConfig, new: Sequence[str]
) -> dict[str, Any]:
    """The entry `imported` of `model.json`; logs settings of the source that are replaced.

    Args:
      sources: the language or whole model, then its tower if it came separately.
      new: paths of parameters that no source has.

    Raises:
      UserError: if the source's settings are no JSON objects.
    """
    model = sources[0]
    is_whole = model.projector is not None and config.vision is not None
    replaced = replaced_image_settings(model.folder, config.vision) if is_whole else []
    if replaced:
        size = config.vision.image_size
        LOG.warning(
            "%s: images are padded to squares and resized to %d x %d pixels; this replaces, in its "
            "image processor, %s",
            model.folder,
            size,
            size,
            ", ".join(replaced),
        )
    generation = read_generation(model.folder)
    if generation:
        LOG.info(
            "%s: generation settings %s come back from an export until a stage trains the model; "
            "a trained model is exported with greedy decoding",
            model.folder,
            ", ".join(f"{name} {value!r}" for name, value in generation.items()),
        )
    return {
        "from": [str(source.folder) for source in sources],
        "new": list(new),
        "context": model.context,
        # Whether the head, which is the embedding, was stored a second time.
        "stored_head": config.decoder.tied_head and model.tied in model.checkpoint,
        "generation": generation,
        "replaced": replaced,
    }


def copy_pooling_head(source: Source, folder: Path) -> None:
    """Copies SigLIP's pooling head, which no feature depends on, into a model folder."""
    head = {
        name.removeprefix(source.pooling): tensor
        for name, tensor in source.checkpoint.items()
        if source.pooling and name.startswith(source.pooling)
    }
    if head:
        planned = [TensorSpec(name, x.dtype, x.shape) for name, x in head.items()]
        for name, place in create_file(folder / POOLING, planned).items():
            write(place, head[name].read())


def copy_chat_template(source: Path, folder: Path) -> None:
    """Copies a source's own chat template into a model folder."""
    if template := read_chat_template(source):
        (folder / FILE).write_text(template, encoding="utf-8")
