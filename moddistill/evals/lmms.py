"""lmms-eval runs models in this process: `lmms-eval --model moddistill --model_args model=DIR`.

lmms-eval (extra `eval`) finds `manifest` by its entry point. It gives a model requests in one of
two forms: `Simple` ones are a text and images, `Chat` ones are messages. Both become prompts, which
are answered together, whatever their task; the longest come first.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from moddistill.config import MeshConfig
from moddistill.convert.resolve import as_model_folder
from moddistill.data.records import IMAGE
from moddistill.data.tokenizer import Tokenizer
from moddistill.distributed.sharding import make_mesh
from moddistill.errors import UserError, invalid, one_line
from moddistill.evals.answer_log import AnswerLog, Given, given_of
from moddistill.evals.expert_load import LOAD_SAMPLES, expert_load
from moddistill.evals.requests import decoding_of, images_of, prompt_of
from moddistill.inference.answer import Decoding
from moddistill.inference.generation import generate
from moddistill.inference.loading import Loaded, load_with_tokenizer
from moddistill.inference.prompts import Prompt
from moddistill.models.vlm import Vlm
from moddistill.storage.digests import fingerprint


def manifest() -> ModelManifest:
    """The model `moddistill` of lmms-eval."""
    return ModelManifest(
        "moddistill",
        simple_class_path=f"{__name__}.Simple",
        chat_class_path=f"{__name__}.Chat",
    )


@dataclasses.dataclass(frozen=True)
class _LaterImage:
    """An image that is read when it is needed; equal ones have the same pixels."""

    digest: str
    read: Callable[[], Image.Image | str] = dataclasses.field(compare=False)

    def __call__(self) -> Image.Image | str:
        return self.read()


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Words an error about the images of a document, which are decoded inside."""
    try:
        yield
    # What PIL raises. Other errors are those of the task, whose code decodes its images.
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        expected = "images that can be read"
        raise UserError(f"expected {expected}, got an error: {one_line(str(error))}") from error


def _digest(image: Image.Image | str) -> str:
    if isinstance(image, str):
        return image
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


class _Model(lmms):
    """A model of lmms-eval.

    Args:
      model: a model folder, a Hugging Face folder or a hub name.
      dtype: of parameters, computation and cache; by default float32 on CPUs, else bfloat16.
      mesh: `MeshConfig` as AXIS=SIZE:AXIS=SIZE; by default all devices have a copy of the model.
      answers: file to which greedy answers are added, and from which they are taken (`AnswerLog`).
      batch_size: not used, nor are the others that lmms-eval passes: as many rows as fit.
    """

    def __init__(
        self,
        model: str,
        dtype: str = "",
        mesh: str = "",
        answers: str = "",
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ):
        del batch_size, max_batch_size, device
        folder = as_model_folder(model)
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        loaded = load_with_tokenizer(folder, dtype, _mesh(mesh))
        log = AnswerLog(Path(answers) if answers else None, f"{fingerprint(folder)} {dtype}")
        self._begin(loaded, log, lambda: None)

    @classmethod
    def of(
        cls,
        model: Vlm,
        params: dict[str, Any],
        tokenizer: Tokenizer,
        on_answer: Callable[[], None],
    ) -> "_Model":
        """Returns a model that is in memory, such as one in training.

        Args:
          on_answer: called after each answer; an error of it ends the evaluation.
        """
        made = cls.__new__(cls)
        made._begin(Loaded(model, params, tokenizer), AnswerLog(None, ""), on_answer)
        return made

    def _begin(self, loaded: Loaded, log: AnswerLog, on_answer: Callable[[], None]) -> None:
        super().__init__()
        self._loaded, self._log, self._on_answer = loaded, log, on_answer
        self._asked: list[Prompt] = []

    def __str__(self) -> str:
        """The name by which the cache of lmms-eval knows the model, whatever the process."""
        return "moddistill"

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise UserError("expected tasks that are answered, got one of likelihoods (loglikelihood)")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise UserError("expected tasks of one round, got one of several (multi_round)")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Returns the answers in the order of the requests; those with equal settings together.

        Raises:
          UserError: questions that cannot be answered, after all others, which are in `answers`.
        """
        groups: dict[Decoding, list[int]] = {}
        prompts: dict[int, Prompt] = {}
        found: dict[int, Given | UserError] = {}
        for number, request in enumerate(requests):
            decoding = decoding_of(request.args[self._settings])
            try:
                prompts[number] = self._prompt(request)
            except UserError as error:
                found[number] = error
            else:
                groups.setdefault(decoding, []).append(number)
        self._asked = list(prompts.values())[:LOAD_SAMPLES]
        with tqdm(total=len(requests), desc="answers", unit="answer", mininterval=1.0) as bar:
            for decoding, numbers in groups.items():
                asked = {number: (requests[number], prompts[number]) for number in numbers}
                found |= self._answer(asked, decoding, bar)
        _check_answered(requests, found)
        return [_result(found[number]) for number in range(len(requests))]

    def _answer(
        self, asked: dict[int, tuple[Instance, Prompt]], decoding: Decoding, bar: tqdm
    ) -> dict[int, Given | UserError]:
        """Returns the answers, or errors, of prompts with equal settings by their numbers."""
        keys = {
            number: self._log.key(request.args[-3:], prompt, decoding)
            for number, (request, prompt) in asked.items()
        }
        # A sampled answer depends on the number of its prompt among those that are asked.
        greedy = not decoding.sampling.temperature
        found: dict[int, Given | UserError] = {}
        if greedy:
            before = {number: self._log.get(key) for number, key in keys.items()}
            found = {number: answer for number, answer in before.items() if answer is not None}
        bar.update(len(found))
        todo = [number for number in asked if number not in found]
        prompts = [asked[number][1] for number in todo]

        def fail(place: int, error: UserError) -> None:
            found[todo[place]] = error

        for place, answer in generate(*self._loaded, prompts, decoding, fail):
            number = todo[place]
            found[number] = given_of(answer)
            if greedy:
                self._log.add(keys[number], found[number])
            bar.update()
            self._on_answer()
        return found

    def expert_load(self) -> list[dict[str, Any]]:
        """Returns the expert load over the prompts that were asked last (see `expert_load`).

        It is empty for dense models, and if lmms-eval took all answers from its own cache.
        """
        prompts, self._asked = self._asked, []
        sparse = self._loaded[0].config.decoder.moe is not None
        return expert_load(*self._loaded, prompts) if prompts and sparse else []

    def _prompt(self, request: Instance) -> Prompt:
        """The prompt of a request, whose images are read again when they are needed.

        The images of a data set would fill the memory.
        """
        with _readable():
            prompt = self._read(request)
            digests = list(map(_digest, prompt.images))
        later = [
            _LaterImage(digest, functools.partial(self._image, request, number))
            for number, digest in enumerate(digests)
        ]
        return dataclasses.replace(prompt, images=tuple(later))

    def _image(self, request: Instance, number: int) -> Image.Image | str:
        with _readable():
            return self._read(request).images[number]

    def _doc(self, request: Instance) -> Any:
        *_, number, task, split = request.args
        return self.task_dict[task][split][number]


class Simple(_Model):
    """Requests (text, settings, images of a document, its number, task, split)."""

    is_simple = True
    _settings = 1

    def _read(self, request: Instance) -> Prompt:
        text, _, images_of_doc, *_ = request.args
        images = images_of(images_of_doc(self._doc(request)) or ())
        if IMAGE not in text:
            text = " ".join([IMAGE] * len(images)) + "\n" * bool(images) + text
        return Prompt(text, images)


class Chat(_Model):
    """Requests (text, messages of a document, settings, its number, task, split)."""

    is_simple = False
    _settings = 2

    def _read(self, request: Instance) -> Prompt:
        return prompt_of(request.args[1](self._doc(request)))


def _check_answered(requests: list[Instance], found: dict[int, Given | UserError]) -> None:
    failed = [number for number in sorted(found) if isinstance(found[number], UserError)]
    if failed:
        *_, document, task, _ = requests[failed[0]].args
        raise UserError(
            f"{task}: {len(failed)} of {len(requests)} questions cannot be answered, of which the "
            f"first one is document {document}: {found[failed[0]]}"
        )


def _result(answer: Given) -> GenerationResult:
    return GenerationResult(answer.text, TokenCounts(answer.prompt_tokens, answer.tokens))


def _mesh(text: str) -> Any:
    """Returns the mesh of AXIS=SIZE:AXIS=SIZE, since commas separate the arguments of a model."""
    if not text:
        return make_mesh(MeshConfig())
    try:
        sizes = dict(item.split("=") for item in text.split(":"))
        config = MeshConfig(**{axis: int(size) for axis, size in sizes.items()})
    except (ValueError, TypeError):
        raise invalid("mesh", text, "AXIS=SIZE:AXIS=SIZE") from None
    return make_mesh(config)
