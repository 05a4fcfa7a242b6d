"""The models and records that a run began with, so that it never resumes with others.

A checkpoint holds trained parameters only; frozen ones, the teacher and the tokenizer are read
again from the folders that the config names. `models.json` in the workdir records what these held,
and an id of the run, which its checkpoints have too. `sources.json` records the files of records
and, of their images, some.
"""

import dataclasses
import hashlib
import json
import secrets
from pathlib import Path

from moddistill.convert.resolve import ResolvedModel
from moddistill.distributed.processes import is_main_process
from moddistill.errors import UserError, at_field, invalid
from moddistill.models.vlm import ModelConfig
from moddistill.storage.digests import fingerprint
from moddistill.storage.json_file import read_json, write_json
from moddistill.storage.model_folder import read_source
from moddistill.training.architectures import Models
from moddistill.training.resume import last_step

_NAME, _SOURCES = "models.json", "sources.json"
RUN = "run"  # its id, in `models.json` and in the source of the model that it makes


def check_models(models: Models, workdir: Path) -> None:
    """Compares the models of a run that is going to resume with those it began with.

    Raises:
      UserError: if a model folder or the tokenizer has other content now, or their record is
        missing.
    """
    recorded = read_json(workdir / _NAME)
    for name, digest in _fingerprints(models).items():
        if recorded.get(name) != digest:
            model = getattr(models, name)
            if isinstance(model, ResolvedModel):
                what, shown = "model", f"{model.spec!r} with other content"
            else:
                what, shown = "cache" if model is None else "tokenizer", "another one"
            raise UserError(
                f"config.{name}: expected the {what} that the run in {workdir} began with (digest "
                f"{str(recorded.get(name))[:12]}), got {shown} ({digest[:12]}); restore it, or use "
                "another --workdir"
            )


def write_models(models: Models, workdir: Path) -> None:
    """Records the models that a run begins with."""
    if is_main_process():
        write_json(workdir / _NAME, _fingerprints(models) | {RUN: secrets.token_hex(16)})


def run_id(workdir: Path) -> str:
    """Returns the id of the run in a workdir, which begins once `models.json` is written."""
    found = read_json(workdir / _NAME).get(RUN)
    if not isinstance(found, str):
        raise invalid(f"{workdir / _NAME}: {RUN}", found, "the id of the run")
    return found


def check_is_of_run(model: Path, workdir: Path) -> None:
    """Raises UserError for a model that another run than that of the workdir has made."""
    found = read_source(model).get(RUN)
    if (workdir / _NAME).exists() and found != run_id(workdir):
        raise UserError(
            f"{model}: expected the model that the run in {workdir} has made (run "
            f"{run_id(workdir)[:8]}), or none, which is then made again, got one of run "
            f"{str(found)[:8]}"
        )


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
                f"config.data: expected the records and images that the run in {workdir} began "
                f"with, got {path!r} with other content; restore it, or use another --workdir"
            )


def _fingerprints(models: Models) -> dict[str, str]:
    """Digests of tokenizer and model folders by their settings; new weights have none."""
    found = {"tokenizer": models.tokenizer.digest}
    for name in ("student", "teacher", "vision"):
        model = getattr(models, name)
        if model is not None and model.folder is not None:
            with at_field(f"config.{name}"):
                found[name] = model_fingerprint(model.folder, model.config)
    if models.cache is not None:
        with at_field("config.teacher"):
            found["teacher"] = fingerprint(models.cache.folder)
    return found


def model_fingerprint(folder: Path, config: ModelConfig) -> str:
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
