"""lmms-eval with our plug-in against its own `llava_hf` on the exported model: answers and time.

    make judge MODEL=runs/demo/preference/model
    python -m benchmarks.judge --model random:qwen2-0.5b --first

in an environment with lmms-eval whole. 500 questions of easy-VQA (data/easy_vqa), greedy, float32.
Each side is the command of lmms-eval in a process of its own, with the time that it takes to load
and compile. Questions are spread evenly over the published ones, so that most have an image of
their own, or the first ones, about ten on each image.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.models import random_params
from moddistill.convert.exporting import export_model
from moddistill.data.tokenizer import train_bpe
from moddistill.evals import easy_vqa
from moddistill.models.presets import preset, with_vocabulary
from moddistill.storage.model_folder import save_model

_TASK = "easy_vqa_local"


def write_task(folder: Path, data: Path, count: int, first: bool) -> None:
    """Writes the task and its records: the first questions, or some spread over all of them."""
    import datasets

    questions = easy_vqa.questions(data)
    chosen = questions[:: 1 if first else max(1, len(questions) // count)][:count]
    rows = [
        {
            "question": each.prompt.replace("<image>", "").strip(),
            "image": each.images[0],
            "answer": each.answers[0],
        }
        for each in chosen
    ]
    records = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    records.to_parquet(str(folder / "records.parquet"))
    here = Path(__file__).parent
    shutil.copy(here / "utils.py", folder)
    text = (here / "easy_vqa.yaml").read_text()
    (folder / "easy_vqa.yaml").write_text(text.replace("RECORDS", str(folder / "records.parquet")))


def save_random(folder: Path, name: str, data: Path) -> None:
    """Writes a preset with random weights, and a tokenizer of the questions."""
    tokenizer = train_bpe([each.prompt for each in easy_vqa.questions(data)], 512)
    config = with_vocabulary(preset(name), tokenizer.real_ids, tokenizer.image_id)
    save_model(folder, config, random_params(config, 0), tokenizer, {})


def run(model: str, arguments: str, task: Path, out: Path) -> dict[str, Any]:
    """Runs lmms-eval; returns the answers by document, the scores and the seconds."""
    command = [sys.executable, "-m", "lmms_eval", "--model", model, "--model_args", arguments]
    command += ["--tasks", _TASK, "--include_path", str(task), "--batch_size", "1"]
    command += ["--device", "cpu", "--output_path", str(out), "--log_samples"]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr)
    seconds = time.perf_counter() - began
    [samples] = out.rglob("*samples*.jsonl")
    [results] = out.rglob("*results.json")
    rows = map(json.loads, samples.read_text().splitlines())
    answers = {row["doc_id"]: row["filtered_resps"][0].strip() for row in rows}
    scores = json.loads(results.read_text())["results"][_TASK]
    return {"answers": answers, "score": scores["exact_match,none"], "seconds": seconds}


def main() -> None:
    """Prints both sides, and exits with 1 if answers or scores differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.judge", description=__doc__)
    parser.add_argument("--model", required=True, help="model folder, or random:PRESET")
    parser.add_argument("--data", default=Path("data/easy_vqa"), type=Path)
    parser.add_argument("--count", default=500, type=int, help="questions")
    parser.add_argument("--first", action="store_true", help="the first questions, not spread ones")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = folder / "task"
        task.mkdir()
        write_task(task, args.data, args.count, args.first)
        model = folder / "model"
        if args.model.startswith("random:"):
            save_random(model, args.model.removeprefix("random:"), args.data)
        else:
            model = Path(args.model)
        export_model(model, folder / "export", max_shard_size=10**10)
        sides = {
            "moddistill": f"model={model}",
            "llava_hf": f"pretrained={folder / 'export'},device_map=cpu,dtype=float32",
        }
        found = {side: run(side, text, task, folder / side) for side, text in sides.items()}
    ours, theirs = found.values()
    equal = sum(ours["answers"][doc] == text for doc, text in theirs["answers"].items())
    for side, figures in found.items():
        rate = len(figures["answers"]) / figures["seconds"]
        print(f"{side:>10}: exact match {figures['score']:.4f}, {rate:.2f} questions/s")
    print(f"{equal} of {len(theirs['answers'])} answers are equal")
    print(f"{theirs['seconds'] / ours['seconds']:.2f} times the throughput")
    sys.exit(equal != len(theirs["answers"]) or ours["score"] != theirs["score"])


if __name__ == "__main__":
    main()
