"""The models and records that a run began with, so that it never resumes with others.

A checkpoint holds trained parameters only; frozen ones and the teacher are read again from the
folders that the config names. `models.json` in the workdir records what these folders held.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

from moddistill.distributed.processes import is_main_process
from moddistill.errors import UserError, at_field
from moddistill.models.vlm import ModelConfig
from moddistill.storage.digests import fingerprint
from moddistill.storage.json_file import read_json, write_json
from moddistill.storage.model_folder import read_source
from moddistill.training.architectures import Models
from moddistill.training.resume import last_step

_NAME, _SOURCES = "models.json", "sources.json"


def check_models(models: Models, workdir: Path) -> None:
    """Compares the models of a run that is going to resume with those it began with.

    Raises:
      UserError: if a model folder has other content now, or its record is missing.
    """
    recorded = read_json(workdir / _NAME)
    for name, digest in _fingerprints(models).items():
        if recorded.get(name) != digest:
            spec = getattr(models, name).spec
            raise UserError(
                f"config.{name}: expected the model that the run in {workdir} began with "
                f"(digest {str(recorded.get(name))[:12]}), got {spec!r} with "
                f"other content ({digest[:12]}); restore it, or use another --workdir"
            )


def write_models(models: Models, workdir: Path) -> None:
    """Records the models that a run begins with."""
    if is_main_process():
        write_json(workdir / _NAME, _fingerprints(models))


def check_sources(digests: dict[str, str], workdir: Path) -> None:
    """Compares the files of records with those that the run began with, or records them.

    Raises:
      UserError: if a file has other content now, since the order of records would be another one;
        or if the record of a run that resumes is missing.
    """
    file = workdir / _SOURCES
    if last_step(workdir) is None:
        if is_main_process():
            write_json(file, digests)
        return
    recorded = read_json(file)
    for path in sorted(digests.keys() | recorded.keys()):
        if digests.get(path) != recorded.get(path):
            raise UserError(
                f"config.data.sources: expected the records that the run in {workdir} began with, "
                f"got {path!r} with other content; restore it, or use another --workdir"
            )


def _fingerprints(models: Models) -> dict[str, str]:
    """The digest of each model folder by the setting that names it; new weights have none."""
    found = {}
    for name in ("student", "teacher", "vision"):
        model = getattr(models, name)
        if model is not None and model.folder is not None:
            with at_field(f"config.{name}"):
                found[name] = _fingerprint(model.folder, model.config)
    return found


def _fingerprint(folder: Path, config: ModelConfig) -> str:
    """A digest of a model that stays the same when the same weights are imported again.

    Files of array stores differ from one import to the next, so an import records the digest of
    the weights themselves. Other models are made once, and identified by their files.
    """
    weights = read_source(folder).get("imported", {}).get("weights")
    if weights is None:
        return fingerprint(folder)
    # The architecture too: import flags such as `--select_layer` change it, but not the weights.
    identity = json.dumps([dataclasses.asdict(config), weights])
    return hashlib.sha256(identity.encode()).hexdigest()
