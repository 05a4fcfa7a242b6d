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
    """Answers to be written that are read together, the one with the longest prompt first.

    Attributes:
      shared: the first tokens of the prompts, which are the same and end with the last image;
        0 if there is one prompt, which is read as a whole.
    """

    writings: list[Writing]
    shared: int = 0

    @property
    def tokens(self) -> int:
        """The number of tokens that are read."""
        return self.shared + sum(len(each.prompt_ids) - self.shared for each in self.writings)


def runs_of(
    waiting: Sequence[Writing], prompts: Sequence[Prompt], image_id: int, most: int
) -> list[Run]:
    """Returns the runs of at most `most` answers, the one with the longest prompt first.

    So those that are read together have about one length, and too little memory is noticed at once.
    """
    groups: dict[Hashable, list[Writing]] = {}
    for writing in sorted(waiting, key=lambda writing: -len(writing.prompt_ids)):
        images = prompts[writing.number].images
        key = _beginning(writing.prompt_ids, images, image_id) if images and most > 1 else writing
        groups.setdefault(key, []).append(writing)
    found = []
    for group in groups.values():
        for first in range(0, len(group), most):
            writings = group[first : first + most]
            shared = _images_end(writings[0].prompt_ids, image_id) if len(writings) > 1 else 0
            found.append(Run(writings, shared))
    return found


def _beginning(ids: Sequence[int], images: Sequence[Any], image_id: int) -> Hashable:
    """What a prompt has in common with others: its tokens up to the last image, and its images."""
    tokens = np.array(ids[: _images_end(ids, image_id)], np.int32).tobytes()
    # Images in memory have no hash; the same one may be part of several prompts.
    return tokens, tuple(id(x) if isinstance(x, Image.Image) else x for x in images)


def _images_end(ids: Sequence[int], image_id: int) -> int:
    """The tokens up to the last one of an image."""
    return len(ids) - ids[::-1].index(image_id)
