"""Time and peak memory of converting a large sharded checkpoint: import, export, upcycling.

    python -m benchmarks.convert [--gigabytes 2] [--shards 20] [--json]

The checkpoint is a Qwen2 with random bfloat16 weights. It is imported and exported. A float32 copy
of it, as a training stage saves a model, is exported and upcycled with noise. Each command runs in
its own process, whose peak resident memory the kernel reports. A copy of the files measures the
speed of the disk.
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

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moddistill.convert.families import qwen
from moddistill.convert.rules import mapped_tensors, prefixed
from moddistill.data.tokenizer import load_tokenizer, train_bpe
from moddistill.models.decoder import DecoderConfig
from moddistill.models.vlm import ModelConfig
from moddistill.storage.model_folder import load_params, read_model_config, save_model
from moddistill.storage.safetensors import write
from moddistill.storage.shards import create_shards
from moddistill.storage.tensor import TensorSpec

GIB = 2**30


def make_checkpoint(folder: Path, gigabytes: float, shards: int) -> int:
    """Writes a checkpoint of about `gigabytes`; returns the bytes of its largest shard."""
    folder.mkdir(parents=True)
    tokenizer = train_bpe(["a small tokenizer"], 300)
    tokenizer.save(str(folder))
    layers = max(1, round((gigabytes - 0.6) / 0.0986))
    decoder = DecoderConfig(
        vocab_size=151_936,
        real_ids=tokenizer.real_ids,
        hidden_size=2048,
        intermediate_size=5504,
        num_layers=layers,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
    )
    fields = qwen.text_config(decoder)
    (folder / "config.json").write_text(json.dumps(fields))
    config = ModelConfig(decoder, None, "linear", "chatml", tokenizer.image_id)
    rules = (*prefixed(qwen.RULES, "model."), *qwen.HEAD)
    dtype = np.dtype(ml_dtypes.bfloat16)
    planned = [
        TensorSpec(piece.name, dtype, piece.shape) for piece in mapped_tensors(config, rules)
    ]
    total = sum(tensor.nbytes for tensor in planned)
    rng = np.random.default_rng(0)
    for name, place in create_shards(folder, planned, total // shards).items():
        noise = rng.standard_normal(place.shape, np.float32) * 0.02
        write(place, (noise + ("norm" in name)).astype(dtype))
    return max(file.stat().st_size for file in folder.glob("*.safetensors"))


def save_in_float32(folder: Path, out: Path) -> None:
    """Writes the model of a folder in float32, as a stage saves one with all parameters trained."""
    config = read_model_config(folder)
    tokenizer = load_tokenizer(str(folder))
    save_model(out, config, load_params(folder, config, dtype=jnp.float32), tokenizer, {})


def measure(*command: str) -> tuple[float, float]:
    """Returns seconds and peak resident bytes of a converter command."""
    program = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, sys.executable, "-m", "tools.convert_weights", *command],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return time.monotonic() - began, int(done.stdout.split()[-1]) * 1024


def copy_seconds(source: Path, target: Path) -> float:
    """Copies a folder and returns the seconds that it took."""
    began = time.monotonic()
    shutil.copytree(source, target)
    return time.monotonic() - began


def run(gigabytes: float, shards: int) -> dict[str, Any]:
    """Runs all commands and returns their figures: sizes in bytes, speeds in bytes per second."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        largest = make_checkpoint(root / "hf", gigabytes, shards)
        size = sum(file.stat().st_size for file in (root / "hf").glob("*.safetensors"))
        copy = copy_seconds(root / "hf", root / "copy")
        shutil.rmtree(root / "copy")
        inward, peak_in = measure("import", "--hf", f"{root}/hf", "--out", f"{root}/model")
        outward, peak_out = measure(
            "export", "--model", f"{root}/model", "--out", f"{root}/exported"
        )
        shutil.rmtree(root / "hf")
        shutil.rmtree(root / "exported")
        save_in_float32(root / "model", root / "trained")
        trained, peak_trained = measure(
            "export", "--model", f"{root}/trained", "--out", f"{root}/student"
        )
        shutil.rmtree(root / "student")
        noise = ("--upcycle", "noise", "--noise_std", "0.01")
        upcycled, peak_upcycle = measure(
            "upcycle", "--model", f"{root}/trained", "--out", f"{root}/sparse", *noise
        )
        sparse = sum(file.stat().st_size for file in (root / "sparse").rglob("*") if file.is_file())
    return {
        "checkpoint_bytes": size,
        "largest_shard_bytes": largest,
        "allowed_peak_bytes": round(1.2 * largest + GIB),
        "import_peak_bytes": peak_in,
        "export_peak_bytes": peak_out,
        "export_of_trained_peak_bytes": peak_trained,
        "upcycle_peak_bytes": peak_upcycle,
        "import_bytes_per_second": size / inward,
        "export_bytes_per_second": size / outward,
        "export_of_trained_bytes_per_second": 2 * size / trained,
        "upcycle_bytes_per_second": sparse / upcycled,
        "copy_bytes_per_second": size / copy,
    }


def main() -> None:
    """Entry point of `python -m benchmarks.convert`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    figures = run(args.gigabytes, args.shards)
    if args.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:>35} {value / 1e6:12,.1f} MB" + ("/s" if "second" in name else ""))


if __name__ == "__main__":
    main()
