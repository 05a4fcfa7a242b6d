"""`check`: what an engine would refuse of an export."""

import typing
from pathlib import Path

from moddistill.convert.assignments import assign_tensors
from moddistill.convert.engine_rules import CLASSES, RULES, Engine, Export
from moddistill.convert.sources import Source, open_source
from moddistill.errors import UserError, not_one_of
from moddistill.models.vlm import ModelConfig
from moddistill.storage.json_file import read_json

ENGINES = typing.get_args(Engine)


def check_engine(folder: Path, engine: str) -> int:
    """Applies the rules of an engine to an export and returns their number.

    Raises:
      UserError: listing everything that the engine refuses or computes differently, with what to
        do; or the folder is no export, or the engine is unknown.
    """
    if engine not in ENGINES:
        raise not_one_of("--engine", engine, ENGINES)
    export = _read(folder)
    rules = [rule for rule in RULES if engine in rule.origins]
    faults = _tensor_faults(export.source)
    for rule in rules:
        if found := rule.find(export):
            faults.append(f"{found}: {rule.remedy} ({rule.origins[engine]})")
    if faults:
        lines = "\n  ".join(faults)
        raise UserError(f"{folder}: {engine} refuses this export:\n  {lines}")
    return len(rules)


def _read(folder: Path) -> Export:
    if (folder / "model.json").is_file():
        raise UserError(f"{str(folder)!r}: expected an export, got a model folder; export it first")
    if not (folder / "config.json").is_file():
        raise UserError(f"{str(folder)!r}: expected an export, got a folder without config.json")
    config = read_json(folder / "config.json")
    classes = config.get("architectures")
    if not isinstance(classes, list) or len(classes) != 1 or classes[0] not in CLASSES:
        raise UserError(
            f"{folder / 'config.json'}: architectures: expected one of {', '.join(CLASSES)}, as "
            f"export writes them, got {classes!r:.200}"
        )
    source = open_source(folder)
    return Export(source, config, frozenset(file.name for file in folder.iterdir()))


def _tensor_faults(source: Source) -> list[str]:
    """Returns the tensors that are missing, unexpected or of another shape than the config's."""
    config = ModelConfig(
        decoder=source.decoder,
        vision=source.vision,
        projector=source.projector or "mlp2x_gelu",
        template=source.template,
        image_token_id=source.tokenizer.image_id,
    )
    try:
        assign_tensors(source, config)
    except UserError as error:
        return [str(error)]
    return []
