"""Time and memory from parquet files of preference pairs to batches, without a conversion.

    python -m benchmarks.data_parquet [--rows 6000] [--kib 150] [--json]

One file of RLAIF-V's schema and size (`openbmb/RLAIF-V-Dataset` has 83,132 pairs in 14 files of
0.75 to 1.1 GB), with row groups of 100 rows, of 1,000, and of 6,000, and with images that are in
one row or in four. Images are noise, each of about `kib` KiB. Each case has a process of its own,
which makes the index of the file, and then reads 30 batches of 16 packed rows in shuffled order.
`memory_mib` is the largest resident memory of this process, modules and tokenizer included.
"""

import argparse
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.data_texts import Conversations, qwen_tokenizer
from benchmarks.digests import forget
from benchmarks.head_to_head import MIB, resident_bytes
from benchmarks.processes import in_new_process
from moddistill.config import DataConfig, SourceConfig
from moddistill.data.image_decoding import ImageRules
from moddistill.data.images import PAD_COLOR
from moddistill.data.pipeline import Batches, open_sources, plan_rows
from moddistill.data.rows import RowMaker, RowSpec, needed_image_slots

BATCHES, ROWS = 30, 16
CASES = ((100, 1), (1000, 1), (1000, 4), (6000, 1))
SPEC = RowSpec("preference", "vicuna", 2048, 336, 576, ImageRules(pad_color=PAD_COLOR))
_DISTINCT = 50  # images, but for a comment


def _images(kib: int) -> list[bytes]:
    """Returns JPEG files of noise, of about a size."""
    rng, side = np.random.default_rng(0), round(np.sqrt(kib * 1024 / 0.42))  # 0.42 bytes a pixel
    files = []
    for _ in range(_DISTINCT):
        out = io.BytesIO()
        pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(out, "JPEG", quality=50)
        files.append(out.getvalue())
    return files


def with_comment(images: list[bytes], number: int) -> bytes:
    """Returns one of some JPEG files, made different by a comment with a number."""
    file = images[number % len(images)]
    return file[:2] + b"\xff\xfe\x00\x0a%08d" % number + file[2:]


def write_file(folder: Path, rows: int, group: int, uses: int, kib: int) -> int:
    """Writes a parquet file of RLAIF-V's schema; returns its size in bytes.

    Args:
      uses: of each image, in consecutive rows.
    """
    import pyarrow as pa
    import pyarrow.parquet

    images = _images(kib)
    conversations = Conversations(qwen_tokenizer(folder / "qwen"))
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    names = ("ds_name", "question", "chosen", "rejected", "origin_dataset", "origin_split")
    schema = pa.schema(
        [(name, pa.string()) for name in names]
        + [("image", image), ("idx", pa.int64()), ("image_path", pa.string())]
    )

    def record(number: int) -> dict[str, Any]:
        question, chosen, *_ = (turn["value"] for turn in conversations.make())
        return {
            "ds_name": "RLAIF-V",
            "question": question.removeprefix("<image>\n"),
            "chosen": chosen,
            "rejected": f"{chosen} It is red.",
            "origin_dataset": "COCO",
            "origin_split": "{}",
            "image": {"bytes": with_comment(images, number // uses), "path": f"{number}.jpg"},
            "idx": number,
            "image_path": f"RLAIF-V-Dataset_000/{number}.jpg",
        }

    path = folder / "RLAIF-V-Dataset_000.parquet"
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, group):
            records = [record(number) for number in range(start, min(start + group, rows))]
            writer.write_table(pa.Table.from_pylist(records, schema), row_group_size=group)
    return path.stat().st_size


def read_batches(folder: Path) -> dict[str, float]:
    """Returns seconds of the index and of batches, and the peak of memory."""
    tokenizer = qwen_tokenizer(folder / "qwen")
    source = SourceConfig(str(folder / "*.parquet"))
    config = DataConfig({"pairs": source}, template=SPEC.template)
    began = time.perf_counter()
    sources = open_sources(config, SPEC, tokenizer)
    indexed, index_memory = time.perf_counter(), resident_bytes("VmHWM")
    plan, slots = plan_rows(config, sources, seed=0), needed_image_slots(sources, packing=True)
    batches = Batches(
        RowMaker(plan, sources, tokenizer, SPEC, slots),
        local_rows=range(ROWS),
        batch_size=ROWS,
        workers=0,
        timeout=60,
        lists=folder,
        max_rejected=0.0,
    )
    next(batches)
    first, samples = time.perf_counter(), 0
    for _ in range(BATCHES):
        samples += int(next(batches).chosen.segments.max(axis=1).sum())
    done = time.perf_counter()
    batches.close()
    return {
        "index_seconds": indexed - began,
        "first_batch_seconds": first - indexed,
        "samples_per_second": samples / (done - first),
        "index_memory_mib": index_memory / MIB,
        "memory_mib": resident_bytes("VmHWM") / MIB,
    }


def measure(rows: int, kib: int) -> dict[str, dict[str, float]]:
    """Returns the figures by rows of a row group and uses of an image."""
    result = {}
    for group, uses in CASES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            size = in_new_process(write_file, folder, rows, min(group, rows), uses, kib)
            forget(folder)
            figures = {"file_mib": size / MIB} | in_new_process(read_batches, folder)
            result[f"row groups of {group}, {uses} rows an image"] = figures
    return result


def main() -> None:
    """Entry point of `python -m benchmarks.data_parquet`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_parquet", description=__doc__)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--kib", type=int, default=150, help="size of an image")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args.rows, args.kib)
    if args.json:
        print(json.dumps(result))
        return
    for case, figures in result.items():
        print(f"{case}: {json.dumps(figures, indent=2)}")


if __name__ == "__main__":
    main()
