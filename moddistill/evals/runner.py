"""Answers the questions of a task and scores them."""

import importlib
import json
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from moddistill import evals
from moddistill.convert.resolve import as_model_folder, load
from moddistill.data.records import IMAGE
from moddistill.data.tokenizer import Tokenizer, load_tokenizer
from moddistill.errors import UserError, nearest
from moddistill.inference.decode import answer, without_drops
from moddistill.inference.prompts import Prompt, prompt_batch
from moddistill.models.vlm import Vlm
from moddistill.storage import digests

BATCH = 256


LONGEST_ANSWER = 16


LOAD_SAMPLES = 512


def find_benchmark(name: str) -> ModuleType:
    """The module of a benchmark; UserError with the known names for another one."""
    known = sorted(module.name for module in pkgutil.iter_modules(evals.__path__))
    if name not in known:
        raise UserError(
            f"benchmark {name!r} is unknown; accepted: {', '.join(known)}{nearest(name, known)}"
        )
    return importlib.import_module(f"{evals.__name__}.{name}")


def evaluate(folder: str | Path, name: str, data: Path, out: Path) -> dict[str, Any]:
    """Answers all questions of a benchmark greedily, writes both files and returns the scores.

    Scores of a sparse model have `expert_load`: for each expert layer the share of its assignments
    that each expert got, of `image` and of `text` tokens.
    """
    module = find_benchmark(name)
    digests.check_outside(out / "scores.json", "--out")
    folder = as_model_folder(folder)
    questions = module.questions(data)
    model, params = load(folder)
    tokenizer = load_tokenizer(str(folder))
    prompts = [Prompt(question.prompt, (str(question.image),)) for question in questions]
    predictions = answer_all(model, params, tokenizer, prompts)
    rows = [
        {
            "question": question.prompt.replace(IMAGE, "").strip(),
            "image": str(question.image),
            "answer": question.answer,
            "prediction": prediction,
        }
        for question, prediction in zip(questions, predictions, strict=True)
    ]
    scores = module.score(rows)
    if model.config.decoder.moe is not None:
        scores["expert_load"] = expert_load(model, params, tokenizer, prompts[:LOAD_SAMPLES])
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / "predictions.jsonl").write_text(lines)
    (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def answer_all(
    model: Vlm, params: dict[str, Any], tokenizer: Tokenizer, prompts: Sequence[Prompt]
) -> list[str]:
    """Texts of greedy answers, in batches of one size; the last one is filled up with its first."""
    texts: list[str] = []
    for start in tqdm(range(0, len(prompts), BATCH), desc="answers", unit="batch", mininterval=1.0):
        part = list(prompts[start : start + BATCH])
        filled = part + part[:1] * (BATCH - len(part))
        answers = answer(model, params, tokenizer, filled, max_new_tokens=LONGEST_ANSWER)
        texts += [item.text for item in answers[: len(part)]]
    return texts


def expert_load(
    model: Vlm, params: dict[str, Any], tokenizer: Tokenizer, prompts: Sequence[Prompt]
) -> list[dict[str, Any]]:
    """Share of assignments of each expert, by layer and modality, over the tokens of prompts."""
    batch = prompt_batch(prompts, model.config, tokenizer)
    model = without_drops(model)
    load_of = jax.jit(lambda params, batch: model.apply({"params": params}, batch).router.load)
    text, image = np.moveaxis(np.asarray(load_of(params, batch)), 1, 0)
    layers = model.config.decoder.moe_layers
    return [
        {"layer": layer, "image": _shares(image[i]), "text": _shares(text[i])}
        for i, layer in enumerate(layers)
    ]


def _shares(load: np.ndarray) -> list[float]:
    return (load / max(load.sum(), 1.0)).tolist()
