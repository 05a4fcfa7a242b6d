"""lmms-eval runs models in this process: `lmms-eval --model moddistill --model_args model=DIR`.

lmms-eval (extra `eval`) finds `manifest` by its entry point. It gives a model requests in one of
two forms: `Simple` ones are a text and images, `Chat` ones are messages. Both become prompts, which
are answered together, whatever their task; the longest come first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from moddistill.config import MeshConfig
from moddistill.convert.resolve import as_model_folder, load
from moddistill.data.records import IMAGE
from moddistill.data.tokenizer import Tokenizer, load_tokenizer
from moddistill.distributed.sharding import make_mesh
from moddistill.errors import UserError, invalid
from moddistill.inference.answer import Answer, Decoding
from moddistill.inference.generation import generate
from moddistill.inference.prompts import Prompt
from moddistill.inference.sampling import Sampling
from moddistill.models.vlm import Vlm

_LONGEST = 1024  # tokens of an answer whose task does not say
# Settings of requests for `transformers` that greedy answers, or images of one size, do not need.
_UNUSED = ("do_sample", "num_beams", "use_cache", "image_aspect_ratio", "image_sizes")


def manifest() -> ModelManifest:
    """The model `moddistill` of lmms-eval."""
    return ModelManifest(
        "moddistill",
        simple_class_path=f"{__name__}.Simple",
        chat_class_path=f"{__name__}.Chat",
    )


class _Model(lmms):
    """A model of lmms-eval.

    Args:
      model: a model folder, a Hugging Face folder or a hub name.
      dtype: of parameters, computation and cache; by default float32 on CPUs, else bfloat16.
      mesh: `MeshConfig` as AXIS=SIZE:AXIS=SIZE; by default all devices have a copy of the model.
      batch_size: not used, nor are the others that lmms-eval passes: as many rows as fit.
    """

    def __init__(
        self,
        model: str,
        dtype: str = "",
        mesh: str = "",
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ):
        super().__init__()
        del batch_size, max_batch_size, device
        folder = as_model_folder(model)
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        loaded = load(folder, dtype=jnp.dtype(dtype), mesh=_mesh(mesh), stacked=False)
        self._loaded = (*loaded, load_tokenizer(str(folder)))
        self._on_answer = lambda: None

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
        lmms.__init__(made)
        made._loaded = model, params, tokenizer
        made._on_answer = on_answer
        return made

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise UserError("expected tasks that are answered, got one of likelihoods (loglikelihood)")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise UserError("expected tasks of one round, got one of several (multi_round)")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Returns the answers in the order of the requests; those with equal settings together.

        Raises:
          UserError: questions that cannot be answered, after all others, which are in the cache.
        """
        groups: dict[Decoding, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(_decoding(request.args[self._settings]), []).append(number)
        found: dict[int, Answer | UserError] = {}
        with tqdm(total=len(requests), desc="answers", unit="answer", mininterval=1.0) as bar:
            for decoding, numbers in groups.items():
                group = [requests[number] for number in numbers]
                found |= zip(numbers, self._answer(group, decoding, bar), strict=True)
        _check_answered(requests, found)
        return [_result(found[number]) for number in range(len(requests))]

    def _answer(
        self, requests: list[Instance], decoding: Decoding, bar: tqdm
    ) -> list[Answer | UserError]:
        prompts = [self._prompt(request) for request in requests]
        found: dict[int, Answer | UserError] = {}
        for number, answer in generate(*self._loaded, prompts, decoding, found.__setitem__):
            found[number] = answer
            key = (prompts[number].question, requests[number].args[self._settings])
            self.cache_hook.add_partial("generate_until", key, answer.text)
            bar.update()
            self._on_answer()
        return [found[number] for number in range(len(requests))]

    def _doc(self, request: Instance) -> Any:
        *_, number, task, split = request.args
        return self.task_dict[task][split][number]


class Simple(_Model):
    """Requests (text, settings, images of a document, its number, task, split)."""

    is_simple = True
    _settings = 1

    def _prompt(self, request: Instance) -> Prompt:
        text, _, images_of, *_ = request.args
        images = _images(images_of(self._doc(request)) or ())
        if IMAGE not in text:
            text = " ".join([IMAGE] * len(images)) + "\n" * bool(images) + text
        return Prompt(text, images)


class Chat(_Model):
    """Requests (text, messages of a document, settings, its number, task, split)."""

    is_simple = False
    _settings = 2

    def _prompt(self, request: Instance) -> Prompt:
        return prompt_of(request.args[1](self._doc(request)))


def prompt_of(messages: Sequence[dict[str, Any]]) -> Prompt:
    """Returns the prompt of messages with contents of type `text` and `image`.

    An image is `<image>` and a line break, as in the chat template of an export.

    Raises:
      UserError: another content than texts and images, or roles that do not alternate.
    """
    texts: list[tuple[str, str]] = []
    images: list[Any] = []
    for message in messages:
        parts = []
        for content in message["content"]:
            if content["type"] == "text":
                parts.append(content["text"])
            elif content["type"] == "image":
                parts.append(f"{IMAGE}\n")
                images.append(content["url"])
            else:
                raise invalid("content of a message", content["type"], "text or image")
        texts.append((message["role"], "".join(parts)))
    system = texts.pop(0)[1] if texts and texts[0][0] == "system" else None
    roles = [role for role, _ in texts]
    if len(roles) % 2 == 0 or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        expected = "user and assistant in turns, the user first and last"
        raise invalid("roles of messages", roles, expected)
    said = [text for _, text in texts]
    history = tuple(zip(said[:-1:2], said[1::2], strict=True))
    return Prompt(said[-1], _images(images), history, system)


def _images(images: Sequence[Any]) -> tuple[Image.Image | str, ...]:
    """Images as prompts have them: RGB, or files."""
    found: list[Image.Image | str] = []
    for image in images:
        if isinstance(image, Image.Image):
            found.append(image.convert("RGB"))
        elif isinstance(image, str):
            found.append(image)
        else:
            raise invalid("image of a question", type(image).__name__, "a picture, not a video")
    return tuple(found)


def _decoding(settings: dict[str, Any]) -> Decoding:
    """Returns the settings of a request.

    Raises:
      UserError: a setting that no answer follows here.
    """
    settings = dict(settings)
    until = settings.pop("until", None) or ()
    sampled = bool(settings.get("temperature")) and settings.get("do_sample", True)
    if settings.get("num_beams") not in (None, 1):
        raise invalid("num_beams", settings["num_beams"], "1")
    found = {
        "max_new_tokens": settings.pop("max_new_tokens", None) or _LONGEST,
        "stop": (until,) if isinstance(until, str) else tuple(until),
    }
    names: dict[str, Callable[[Any], Any]] = {
        "temperature": float, "top_p": float, "top_k": int, "min_p": float,
        "repetition_penalty": float,
    }  # fmt: skip
    sampling = {name: kind(settings[name]) for name, kind in names.items() if settings.get(name)}
    if not sampled:
        sampling = {name: x for name, x in sampling.items() if name == "repetition_penalty"}
    unknown = settings.keys() - names.keys() - set(_UNUSED)
    if unknown:
        expected = f"max_new_tokens, until, {', '.join(names)}"
        raise invalid("generation_kwargs of the task", sorted(unknown), expected)
    return Decoding(**found, sampling=Sampling(**sampling))


def _check_answered(requests: list[Instance], found: dict[int, Answer | UserError]) -> None:
    failed = [number for number in sorted(found) if isinstance(found[number], UserError)]
    if failed:
        *_, document, task, _ = requests[failed[0]].args
        raise UserError(
            f"{task}: {len(failed)} of {len(requests)} questions cannot be answered, of which the "
            f"first one is document {document}: {found[failed[0]]}"
        )


def _result(answer: Answer) -> GenerationResult:
    counts = TokenCounts(len(answer.prompt_ids), len(answer.token_ids))
    return GenerationResult(answer.text, counts)


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
