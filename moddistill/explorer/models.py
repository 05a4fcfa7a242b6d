"""A model of the page."""

import dataclasses
from typing import Any

from moddistill.data.tokenizer import Tokenizer
from moddistill.models.vlm import Vlm


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExploredModel:
    """A model that answers on the page.

    Attributes:
      title: its role and where it is from.
    """

    title: str
    model: Vlm
    params: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def is_sparse(self) -> bool:
        return bool(self.model.config.decoder.moe_layers)
