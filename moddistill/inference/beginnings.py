"""Prompts that begin alike: questions about the same images, whose beginning is read once.

Benchmarks ask several questions about an image, and nearly all tokens of a prompt are its image's.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from moddistill.inference.answer import Writing
from moddistill.inference.prompts import Prompt


@dataclasses.dataclass(frozen=True)
class Run:
    """Answers to be written whose prompts begin alike, the longest prompt first.

    Attributes:
      shared: the first tokens of the prompts, which are the same and end with the last image;
        0 if there is one prompt, which is read as a whole.
    """

    writings: list[Writing]
    shared: int = 0

    @property
    def tokens(self) -> int:
        """The number of tokens that are read once: the beginning, or the whole prompt."""
        return self.shared or len(self.writings[0].prompt_ids)


def runs_of(
    waiting: Sequence[Writing], prompts: Sequence[Prompt], image_id: int, shares: bool
) -> list[Run]:
    """Returns the runs: those that share a beginning, then the others, the longest prompt first.

    So runs of one kind and of about one length are read together.

    Args:
      shares: whether prompts that begin alike are a run; else each is one.
    """
    groups: dict[Hashable, list[Writing]] = {}
    for writing in sorted(waiting, key=lambda writing: -len(writing.prompt_ids)):
        images = prompts[writing.number].images
        key = _beginning(writing.prompt_ids, images, image_id) if images and shares else None
        groups.setdefault(key or writing, []).append(writing)
    runs = [
        Run(group, _images_end(group[0].prompt_ids, image_id) if len(group) > 1 else 0)
        for group in groups.values()
    ]
    return sorted(runs, key=lambda run: not run.shared)


def _beginning(ids: Sequence[int], images: Sequence[Any], image_id: int) -> Hashable:
    """Returns what a prompt has in common with others: its images, and its tokens up to the last.

    It is None if the prompt ends there, as in the template `plain`: the first token of an answer
    follows from a token that is read after the beginning.
    """
    end = _images_end(ids, image_id)
    if end == len(ids):
        return None
    tokens = np.array(ids[:end], np.int32).tobytes()
    # Images in memory have no hash; the same one may be part of several prompts.
    return tokens, tuple(id(x) if isinstance(x, Image.Image) else x for x in images)


def _images_end(ids: Sequence[int], image_id: int) -> int:
    """The tokens up to the last one of an image."""
    return len(ids) - ids[::-1].index(image_id)
