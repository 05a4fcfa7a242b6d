"""A teacher of `transformers`: any `AutoModelForImageTextToText`, with its own processor.

Final hidden states become logits at supervised positions only, some at a time, as in
`extraction.program`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image

from moddistill.data.records import AnyRecord
from moddistill.errors import UserError, one_line
from moddistill.extraction.chat_text import ChatText, chat_texts
from moddistill.extraction.transformers_targets import Positions, targets_of
from moddistill.extraction.transformers_tokens import ChatTokens, Places
from moddistill.models.vocabulary import IdRanges, id_ranges
from moddistill.teachers.entries import Entry, EntryFormat, TokenTargets, text_digest

_TOLERANCE = 0.02  # of logits, relative to the largest; bfloat16 has 0.004


class ReadRecord(NamedTuple):
    """A record, its number among all of all sources, and its images."""

    number: int
    record: AnyRecord
    images: Sequence[Image.Image]


class _UnreadableError(Exception):
    """The processor or the model refuses some rows, because of at least one of them."""


class _Row(NamedTuple):
    """A conversation of a record, or one side of a pair."""

    number: int
    chat: ChatText
    images: Sequence[Image.Image]


@dataclasses.dataclass(frozen=True)
class HowToRead:
    """Settings of a teacher.

    Attributes:
      dtype: of the model.
      temperature: that divides its logits.
      seed: of drawn ids.
      chunk_size: positions whose logits are in memory at one time.
    """

    dtype: str
    temperature: float
    seed: int
    chunk_size: int


class TransformersTeacher:
    """`entries(records, format)`: the entries of a cache.

    Args:
      folder: with config, weights and processor.

    Raises:
      UserError: the folder has no such model, no processor, or no chat template.
    """

    def __init__(self, folder: Path, settings: HowToRead):
        self._settings, self._origin = settings, str(folder)
        self._processor = _loaded(transformers.AutoProcessor, folder)
        self.tokens = ChatTokens(self._processor, self._origin)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        auto = transformers.AutoModelForImageTextToText
        model = _loaded(auto, folder, dtype=getattr(torch, settings.dtype))
        self._model = model.eval().requires_grad_(False).to(self._device)
        self._is_checked = False

    @functools.cached_property
    def real_ids(self) -> IdRanges:
        """Ids of tokens that the model may predict."""
        texts = self.tokens.texts
        ids = {id for id, text in enumerate(texts.texts) if text is not None}
        return id_ranges((ids | {*texts.controls.values()}) - {self.tokens.image_id})

    @torch.inference_mode()
    def entries(self, records: Sequence[ReadRecord], format: EntryFormat) -> list[Entry]:
        """Returns the entries of some records, which are one batch."""
        rows: list[_Row] = []
        sides: list[int | UserError] = []
        for each in records:
            try:
                chats = chat_texts(each.record, self.tokens.template)
            except UserError as error:
                sides.append(error)
                continue
            rows += [_Row(each.number, chat, each.images) for chat in chats]
            sides.append(len(chats))
        found = iter(self._read(rows, format) if rows else ())
        return [
            Entry(None, str(count))
            if isinstance(count, UserError)
            else self._entry([*itertools.islice(found, count)], format)
            for count in sides
        ]

    def _entry(self, sides: Sequence[TokenTargets | UserError], format: EntryFormat) -> Entry:
        for side in sides:
            if isinstance(side, UserError):
                return Entry(None, str(side))
        if format.kind != "answers":
            return Entry(sides[0])
        sums = [side.label_logprobs.sum(dtype=np.float64) for side in sides]
        try:
            digest = text_digest(*(self.tokens.texts.spell(side.labels) for side in sides))
        except UserError as error:  # a control token in the text of an answer
            return Entry(None, str(error))
        return Entry(TokenTargets(np.array(sums, np.float32)), digest=digest)

    def _read(self, rows: Sequence[_Row], format: EntryFormat) -> list[TokenTargets | UserError]:
        """Returns the targets of each row, or the reason why it has none."""
        try:
            return self._read_together(rows, format)
        except _UnreadableError as error:
            if len(rows) > 1:
                return [self._read([row], format)[0] for row in rows]
            return [UserError(str(error))]

    def _read_together(
        self, rows: Sequence[_Row], format: EntryFormat
    ) -> list[TokenTargets | UserError]:
        try:
            inputs = self._inputs(rows)
        except Exception as error:  # of any processor
            raise _UnreadableError(f"processor: {one_line(str(error) or repr(error))}") from error
        places = [self._places(row, inputs, number) for number, row in enumerate(rows)]
        good = [(n, each) for n, each in enumerate(places) if isinstance(each, Places)]
        if not good:
            return places
        try:
            hidden = self._hidden(inputs)
        except (UserError, torch.OutOfMemoryError):  # not because of one of the rows
            raise
        except Exception as error:  # of any model, such as for tokens of images without pixels
            raise _UnreadableError(f"model: {one_line(str(error) or repr(error))}") from error
        # Some processors pad on the left, whatever they are asked for.
        mask = inputs["attention_mask"].bool()
        chosen = torch.cat([hidden[n, mask[n]][each.positions - 1] for n, each in good])
        numbers = [
            np.stack([np.full(len(each.labels), rows[n].number), each.positions], axis=1)
            for n, each in good
        ]
        labels = np.concatenate([each.labels for _, each in good])
        targets = self._targets(Positions(chosen, labels, np.concatenate(numbers)), format)
        end = 0
        for n, each in good:
            start, end = end, end + len(each.labels)
            places[n] = TokenTargets(*(None if x is None else x[start:end] for x in targets))
        return places

    def _inputs(self, rows: Sequence[_Row]) -> Any:
        images = [image for row in rows for image in row.images]
        found = self._processor(
            text=[row.chat.text for row in rows],
            images=images or None,
            padding=True,
            truncation=False,
            add_special_tokens=self.tokens.adds_special_tokens(rows[0].chat.text),
            return_tensors="pt",
        )
        if images:
            # Without them, a model would read placeholders as tokens of text.
            pixels = self._processor.image_processor.model_input_names[0]
            if pixels not in found:
                raise UserError(f"expected {pixels} of images, got {sorted(found)}")
        return found

    def _places(self, row: _Row, inputs: Any, number: int) -> Places | UserError:
        ids = inputs["input_ids"][number][inputs["attention_mask"][number].bool()].numpy()
        try:
            return self.tokens.places(row.chat, ids, len(row.images))
        except UserError as error:
            return error

    def _hidden(self, inputs: Any) -> torch.Tensor:
        """Returns the final hidden states of a batch, `[B, T, D]`."""
        inputs = inputs.to(self._device)
        for name, x in inputs.items():
            if torch.is_floating_point(x):
                inputs[name] = x.to(self._model.dtype)
        hidden = self._model.base_model(**inputs, use_cache=False).last_hidden_state
        if not self._is_checked:
            self._check_head(inputs, hidden)
            self._is_checked = True
        return hidden

    def _check_head(self, inputs: Any, hidden: torch.Tensor) -> None:
        """Raises UserError if logits are not the head's of the hidden states, as with soft caps."""
        expected = self._model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        found = self._model.get_output_embeddings()(hidden[:, -1]).float()
        difference = (found - expected).abs().max() / expected.abs().max()
        if not difference <= _TOLERANCE:
            raise UserError(
                f"{self._origin}: expected a model whose logits are a matmul of its last hidden "
                f"states, got others ({float(difference):.1%} apart)"
            )

    def _targets(self, positions: Positions, format: EntryFormat) -> TokenTargets:
        settings, head = self._settings, self._model.get_output_embeddings()
        found = [
            targets_of(chunk, head, format, settings.temperature, settings.seed)
            for chunk in positions.chunks(settings.chunk_size)
        ]
        return TokenTargets(
            *(
                None if parts[0] is None else np.concatenate(parts)
                for parts in zip(*found, strict=True)
            )
        )


def _loaded(auto: Any, folder: Path, **settings: Any) -> Any:
    """Returns what an `Auto` class loads; UserError for whatever it raises."""
    try:
        return auto.from_pretrained(str(folder), trust_remote_code=False, **settings)
    except Exception as error:
        raise UserError(
            f"{folder}: expected what {auto.__name__} of transformers loads, got "
            f"{one_line(str(error) or repr(error))}"
        ) from error
