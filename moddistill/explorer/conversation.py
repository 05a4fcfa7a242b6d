"""A conversation with several models, each with its own earlier answers."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from moddistill.data.image_decoding import ImageRules, decode
from moddistill.data.image_files import read_file
from moddistill.data.images import PAD_COLOR, mean_color
from moddistill.explorer.models import ExploredModel
from moddistill.explorer.routing import Routing, route
from moddistill.inference.answer import Answer, Decoding
from moddistill.inference.generation import stream
from moddistill.inference.prompts import Prompt, encode_prompt, load_images, with_images

_WARM_UP = "What is in the image?"


@dataclasses.dataclass(frozen=True, eq=False)
class Turn:
    """A question with its new images, and the answers of the models in their order.

    An answer that is being written is a text, and those that follow it are not there yet.
    """

    question: str
    images: tuple[Image.Image, ...]
    answers: tuple[str | Answer, ...] = ()


Conversation = tuple[Turn, ...]


def ask(
    models: Sequence[ExploredModel],
    conversation: Conversation,
    question: str,
    files: Sequence[str | Path],
    decoding: Decoding,
) -> Iterator[Conversation]:
    """Yields the conversation with one more turn, as its answers are written one after another.

    Args:
      conversation: its turns have the answers of all models.
      question: `<image>` in it says where the images go, which are first by default.
      files: new images.

    Raises:
      UserError: an image cannot be read, the question is empty, or it does not fit the context of
        a model; before anything is yielded.
    """
    images = read_images(files, models)
    turn = Turn(with_images(question.strip(), len(images)), images)
    prompts = [_prompt((*conversation, turn), number) for number in range(len(models))]
    for model, prompt in zip(models, prompts, strict=True):
        encode_prompt(prompt, model.model.config, model.tokenizer)  # raises before an answer begins
    yield (*conversation, turn)
    for model, prompt in zip(models, prompts, strict=True):
        finished, text = turn.answers, ""
        for part in stream(model.model, model.params, model.tokenizer, prompt, decoding):
            text = part if isinstance(part, Answer) else text + part
            turn = dataclasses.replace(turn, answers=(*finished, text))
            yield (*conversation, turn)


def read_images(
    files: Sequence[str | Path], models: Sequence[ExploredModel]
) -> tuple[Image.Image, ...]:
    """Returns image files as RGB, with transparent pixels as the first vision encoder pads them.

    Raises:
      UserError: a file cannot be read; it names the file without its folder.
    """
    towers = [model.model.config.vision for model in models]
    means = [mean_color(tower.mean) for tower in towers if tower]
    rules = ImageRules(pad_color=means[0] if means else PAD_COLOR)
    images = []
    for file in map(Path, files):
        images.append(decode(read_file(str(file), rules.max_bytes, file.name), rules, file.name))
    return tuple(images)


def _prompt(conversation: Conversation, number: int) -> Prompt:
    """The last question to a model, with its own earlier answers and all images."""
    images = tuple(image for turn in conversation for image in turn.images)
    history = tuple((turn.question, turn.answers[number].text) for turn in conversation[:-1])
    return Prompt(conversation[-1].question, images, history)


def routing_of(model: ExploredModel, conversation: Conversation, number: int) -> Routing | None:
    """Returns the routing of the last prompt and its answer; None for a dense model.

    Args:
      number: the model's among those of the conversation.
    """
    if not model.is_sparse:
        return None
    answer = conversation[-1].answers[number]
    images = load_images(_prompt(conversation, number), model.model.config.vision)
    ids = [*answer.prompt_ids, *answer.token_ids]
    return route(model.model, model.params, ids, images, model.tokenizer.pad_id)


def compile_ahead(models: Sequence[ExploredModel], decoding: Decoding) -> None:
    """Compiles the programs of a short question about an image, so that none waits for them."""
    for number, model in enumerate(models):
        images = (Image.new("RGB", (64, 64)),) if model.model.config.vision else ()
        turn = Turn(with_images(_WARM_UP, len(images)), images)
        prompt = _prompt((turn,), 0)
        next(stream(model.model, model.params, model.tokenizer, prompt, decoding), None)
        ids = encode_prompt(prompt, model.model.config, model.tokenizer)
        answered = Answer("", ids[-1:], ids, "length", [])
        answers = (answered,) * (number + 1)
        routing_of(model, (dataclasses.replace(turn, answers=answers),), number)
