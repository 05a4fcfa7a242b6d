"""A model of the page, and how many tokens it reads."""

import dataclasses
from pathlib import Path
from typing import Any

from moddistill.data.tokenizer import Tokenizer
from moddistill.models.vlm import Vlm
from moddistill.storage.model_folder import read_source

_DEFAULT_CONTEXT = 32_768  # of Qwen, and of exports


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExploredModel:
    """A model that answers on the page.

    Attributes:
      title: its role and where it is from.
      context: tokens of the longest prompt with its answer.
    """

    title: str
    model: Vlm
    params: dict[str, Any]
    tokenizer: Tokenizer
    context: int

    @property
    def is_sparse(self) -> bool:
        return bool(self.model.config.decoder.moe_layers)


def context_length(folder: str | Path) -> int:
    """Returns the context length of a model folder.

    It is that of its source, else the longest row that it was trained on.
    """
    source = read_source(folder)
    trained = source.get("data", {}).get("max_length")
    return source.get("imported", {}).get("context") or trained or _DEFAULT_CONTEXT
