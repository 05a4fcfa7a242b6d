"""Exports in vLLM for CPUs against `moddistill.generate`: 24 greedy tokens after an image.

    make engines [MODELS="DIR ..."]

in an environment with vLLM. Without models of one's own, two small ones with random weights are
compared: a dense one, and one upcycled from it whose experts differ. A sparse model is exported
twice, as it is and with `--uniform`. Each side is a process of its own, in float32.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_NEW = 24
_QUESTIONS = ("what is in this image?", "which colour is the shape, and why?")
_SIZES = ((48, 48), (64, 40), (30, 90))  # of images, most of them no squares


def make_models(folder: Path) -> list[Path]:
    """Writes a dense and a sparse model with heads that vLLM's attention for CPUs has."""
    import jax

    from benchmarks.models import random_params
    from moddistill.config import ExpertConfig, UpcycleConfig
    from moddistill.convert.upcycling import upcycle_model
    from moddistill.data.tokenizer import train_bpe
    from moddistill.models.presets import preset, with_vocabulary
    from moddistill.storage.model_folder import save_model

    tokenizer = train_bpe([" ".join(_QUESTIONS)], 300)
    config = preset("demo-teacher")
    # An untied head, since one that is the embedding repeats the last token at random weights.
    decoder = dataclasses.replace(
        config.decoder, hidden_size=128, num_layers=4, head_dim=32, tie_word_embeddings=False
    )
    config = dataclasses.replace(config, decoder=decoder, template="chatml")
    config = with_vocabulary(config, tokenizer.real_ids, tokenizer.image_id)
    params = jax.tree.map(lambda x: 2 * x, random_params(config, 0))
    save_model(folder / "dense", config, params, tokenizer, {})
    how = UpcycleConfig("noise", noise_std=0.05)
    upcycle_model(folder / "dense", folder / "sparse", ExpertConfig(), how)
    return [folder / "dense", folder / "sparse"]


def export_all(models: list[Path], folder: Path) -> list[tuple[str, Path, Path]]:
    """Exports models; returns the names of the exports with the folders of model and export."""
    from moddistill.convert.exporting import export_model
    from moddistill.storage.model_folder import read_model_config

    exports = []
    for model in models:
        for uniform in (False, True) if read_model_config(model).decoder.moe else (False,):
            out = folder / f"export-{len(exports)}"
            export_model(model, out, max_shard_size=10**10, uniform=uniform)
            name = str(model).removeprefix(f"{folder}/") + (" --uniform" if uniform else "")
            exports.append((name, model, out))
    return exports


def questions(folder: Path) -> list[tuple[Path, str]]:
    """Returns the images, which are written if they are not there, with a question each."""
    from PIL import Image

    made = []
    for number, size in enumerate(_SIZES):
        file = folder / f"{number}.png"
        rng = np.random.default_rng(number)
        patches = rng.integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(patches).resize(size).save(file)
        made += [(file, question) for question in _QUESTIONS]
    return made


def ours(model: Path, asked: list[tuple[Path, str]]) -> list[list[list[int]]]:
    """Returns the ids of prompt and answer to each question by `moddistill.generate`."""
    from moddistill.convert.resolve import load
    from moddistill.data.tokenizer import load_tokenizer
    from moddistill.inference.answer import Decoding
    from moddistill.inference.generation import answer
    from moddistill.inference.prompts import Prompt

    network, params = load(model, stacked=False)
    prompts = [Prompt(f"<image>\n{question}", (str(file),)) for file, question in asked]
    tokenizer = load_tokenizer(str(model))
    answers = answer(network, params, tokenizer, prompts, Decoding(max_new_tokens=_NEW))
    return [[each.prompt_ids, each.token_ids] for each in answers]


def in_vllm(export: Path, asked: list[tuple[Path, str]]) -> list[list[list[int]]]:
    """Returns the same by vLLM, from messages in the form of its server."""
    from PIL import Image
    from vllm import LLM, SamplingParams

    # torchvision resizes to pixels of which some differ by 1 / 255 from PIL's.
    pil = {"backend": "pil"}
    llm = LLM(
        str(export),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        mm_processor_kwargs=pil,
    )
    end = llm.get_tokenizer().eos_token_id
    messages = [
        [{"role": "user", "content": [{"type": "image_pil", "image_pil": Image.open(file)},
                                      {"type": "text", "text": question}]}]
        for file, question in asked
    ]  # fmt: skip
    answers = llm.chat(messages, SamplingParams(temperature=0, max_tokens=_NEW))
    return [
        [list(each.prompt_token_ids), [x for x in each.outputs[0].token_ids if x != end]]
        for each in answers
    ]


_SIDES: dict[str, Callable[..., list[Any]]] = {"moddistill": ours, "vllm": in_vllm}


def run(side: str, model: Path, asked: list[tuple[Path, str]], log: Path) -> list[Any]:
    """Runs one side in its own process; what it prints is in `log`."""
    answers = log.with_suffix(".json")
    work = [side, str(model), [[str(file), text] for file, text in asked], str(answers)]
    command = [sys.executable, "-m", "benchmarks.engines", "--side", json.dumps(work)]
    gibibytes = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # instead of all memory that is free
    with log.open("w") as stream:
        done = subprocess.run(command, stdout=stream, stderr=stream, env=os.environ | gibibytes)
    if done.returncode:
        sys.exit(f"{side} on {model}:\n{log.read_text()[-4000:]}")
    return json.loads(answers.read_text())


def _run_side(work: str) -> None:
    side, model, asked, answers = json.loads(work)
    found = _SIDES[side](Path(model), [(Path(file), text) for file, text in asked])
    Path(answers).write_text(json.dumps(found))


def main() -> None:
    """Prints the comparison of each export, and exits with 1 if a token differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--models", nargs="*", default=[], type=Path, help="model folders")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return _run_side(args.side)
    differs = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked = questions(folder)
        models = args.models or make_models(folder)
        for label, model, export in export_all(models, folder):
            log = folder / "log"
            mine = run("moddistill", model, asked, log)
            theirs = run("vllm", export, asked, log)
            warnings = [
                line
                for line in log.read_text().splitlines()
                if "tokenizer" in line.lower() and re.search("WARNING|Warning", line)
            ]
            equal = sum(a == b for a, b in zip(mine, theirs, strict=True))
            answers = [tokens for _, tokens in mine]
            print(
                f"{label}: {equal} of {len(asked)} answers are equal, {sum(map(len, answers))} "
                f"tokens of {len(set().union(*answers))} kinds; {len(warnings)} warnings of the "
                "tokenizer"
            )
            print(*warnings, sep="\n", end="\n" if warnings else "")
            differs |= equal < len(asked) or bool(warnings)
    sys.exit(differs)


if __name__ == "__main__":
    main()
