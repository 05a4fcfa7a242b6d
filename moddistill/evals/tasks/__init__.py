"""Tasks for lmms-eval, folders in its own format; `lmms-eval --include_path` takes this one.

A task reads the files of its publisher from a folder that an environment variable names; its
`files.json` lists them. Nothing here imports JAX or the rest of the library.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
