"""Parts and settings of a source that are no parameters, for the export of an untrained model.

A model that is imported and exported without training gets back its generation settings, chat
template and pooling head.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moddistill.convert.jinja_template import FILE, read_chat_template
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
    """Returns the entry `imported` of `model.json`; logs settings that training replaces.

    Args:
      sources: the language or multimodal model, then the vision tower if imported separately.
      new: paths of initialised parameters.

    Raises:
      UserError: settings of the source are no JSON objects.
    """
    model = sources[0]
    is_multimodal = model.projector is not None and config.vision is not None
    replaced = replaced_image_settings(model.folder, config.vision) if is_multimodal else []
    generation = read_generation(model.folder)
    _log_settings(model.folder, config, replaced, generation)
    return {
        "from": [str(source.folder) for source in sources],
        "new": list(new),
        # A tied head that the checkpoint stores too.
        "stored_head": config.decoder.tie_word_embeddings and model.tied in model.checkpoint,
        "generation": generation,
        "replaced": replaced,
    }


def _log_settings(
    folder: Path, config: ModelConfig, replaced: Sequence[str], generation: dict[str, Any]
) -> None:
    if replaced:
        size = config.vision.image_size
        LOG.warning(
            "%s: images are padded to squares and resized to %d x %d pixels; this replaces, in its "
            "image processor, %s",
            folder,
            size,
            size,
            ", ".join(replaced),
        )
    if generation:
        LOG.info(
            "%s: generation settings %s come back from an export until a stage trains the model; "
            "a trained model is exported with greedy decoding",
            folder,
            ", ".join(f"{name} {value!r}" for name, value in generation.items()),
        )


def copy_pooling_head(source: Source, folder: Path) -> None:
    """Copies SigLIP's pooling head, which patch features do not use, into a model folder."""
    head = {
        name.removeprefix(source.pooling): tensor
        for name, tensor in source.checkpoint.items()
        if source.pooling and name.startswith(source.pooling)
    }
    if head:
        planned = [TensorSpec(name, x.dtype, x.shape) for name, x in head.items()]
        for name, tensor in create_file(folder / POOLING, planned).items():
            write(tensor, head[name].read())


def copy_chat_template(source: Path, folder: Path) -> None:
    """Copies the chat template of a source into a model folder."""
    if template := read_chat_template(source):
        (folder / FILE).write_text(template, encoding="utf-8")
