"""Cache of imported Hugging Face folders."""

import hashlib
import logging
import os
from pathlib import Path

from moddistill.convert.hub import local_folder
from moddistill.convert.importing import import_model
from moddistill.distributed.processes import barrier, is_main_process
from moddistill.errors import UserError
from moddistill.storage.model_folder import VERSION

LOG = logging.getLogger("moddistill")


def import_once(name: str) -> Path:
    """Returns the model folder of a Hugging Face folder or hub name, imported on first use.

    The main process imports; the others wait.

    Raises:
      UserError: as `import_model`.
    """
    source = local_folder(name).resolve()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "moddistill" / f"{source.name}-{_digest(source)}"
    if is_main_process() and not folder.is_dir():
        LOG.info("importing %s into %s", source, folder)
        try:
            import_model(str(source), folder)
        except UserError:
            if not folder.is_dir():  # imported by another run meanwhile
                raise
    barrier(f"importing {folder}")
    return folder


def _digest(folder: Path) -> str:
    """Returns the cache key: path; names, sizes and times of files; format of model folders."""
    digest = hashlib.sha256(f"{VERSION} {folder}".encode())
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        state = file.stat()
        digest.update(f"\n{file.name} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
