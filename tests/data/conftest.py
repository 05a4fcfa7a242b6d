import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from moddistill.config import DataConfig, SourceConfig
from moddistill.data import parquet_files
from moddistill.data.image_decoding import ImageRules
from moddistill.data.images import PAD_COLOR
from moddistill.data.parquet_files import ParquetFile
from moddistill.data.pipeline import Batches, open_sources, plan_rows
from moddistill.data.rows import RowMaker, RowSpec
from moddistill.data.tokenizer import load_tokenizer, train_bpe
from tests.data import qwen_ranks
from tests.data.published import read_file, write_file
from tests.data.streams import LENGTH, talk

RULES = ImageRules(max_pixels=2**26, exif="apply", pad_color=PAD_COLOR)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """Returns the tokenizer of Qwen1.5 and Qwen2, loaded from a folder."""
    folder = tmp_path_factory.mktemp("qwen")
    qwen_ranks.write_tokenizer_json(folder)
    return load_tokenizer(str(folder))


@pytest.fixture(scope="session")
def small():
    """Returns a tokenizer trained on a few words."""
    return train_bpe(["what colour is the shape ? a red circle , a blue square"] * 4, 300)


@pytest.fixture
def image_file(tmp_path):
    """Writes a random image to `tmp_path` and returns its path."""

    def write(name="a.png", width=8, height=8, seed=0):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        return str(tmp_path / name)

    return write


@pytest.fixture
def data_file(tmp_path):
    """Writes records as JSON, or lines (values or raw text) as JSONL, and returns the path."""

    def write(records, name="data.json"):
        path = tmp_path / name
        if name.endswith(".jsonl"):
            lines = [item if isinstance(item, str) else json.dumps(item) for item in records]
            path.write_text("\n".join(lines) + "\n")
        else:
            path.write_text(json.dumps(records))
        return str(path)

    return write


@pytest.fixture
def read_records(tmp_path):
    """Writes records as JSON, JSONL or parquet; returns those that are read, or the reasons."""

    def read_records(records, suffix=".json", schema=None, **options):
        path = tmp_path / f"records{suffix}"
        write_file(path, records, schema)
        return read_file(path, **options)

    return read_records


@pytest.fixture
def data_config(tmp_path):
    def make(*paths, weights=None, **fields):
        weights = weights or [1.0] * len(paths)
        sources = {
            f"source{number}": SourceConfig(path, str(tmp_path), weight)
            for number, (path, weight) in enumerate(zip(paths, weights, strict=True))
        }
        return DataConfig(sources, max_length=LENGTH, **fields)

    return make


@pytest.fixture
def stream(small, tmp_path):
    """Opens the batches of a config in one of several processes."""

    def make(config, kind="conversation", batch_size=4, seed=0, process=0, processes=1, patches=2):
        spec = RowSpec(kind, "chatml", LENGTH, 4 if patches else 0, patches, RULES)
        sources = open_sources(config, spec, small)
        share = batch_size // processes
        return Batches(
            RowMaker(plan_rows(config, sources, seed), sources, small, spec, 3),
            local_rows=range(process * share, (process + 1) * share),
            batch_size=batch_size,
            workers=config.workers,
            timeout=config.worker_timeout,
            lists=tmp_path,
            max_rejected=config.max_rejected,
        )

    return make


@pytest.fixture
def answers(small):
    """Returns the answers in rows of batches."""

    def of_row(tokens, mask, segments):
        numbers = [number for number in np.unique(segments) if number]
        parts = [tokens[mask & (segments == number)].tolist() for number in numbers]
        return tuple(small.decode(part).strip() for part in parts)

    def read(*batches):
        rows = [zip(b.tokens, b.loss_mask, b.segments, strict=True) for b in batches]
        return [of_row(*row) for batch in rows for row in batch]

    return read


@pytest.fixture
def numbered(data_file, image_file):
    """Writes `count` records whose answers are their numbers, every second one with an image."""

    def write(count, name="data.json", start=0):
        image_file()
        images = [{"image": "a.png"} if number % 2 else {} for number in range(count)]
        return data_file(
            [
                talk("<image> q" if image else "q", str(start + number), **image)
                for number, image in enumerate(images)
            ],
            name,
        )

    return write


@pytest.fixture
def partly_bad(data_file, image_file, tmp_path):
    """Writes 13 records: one has a corrupt image, one a long question, one an empty answer."""
    image_file()
    (tmp_path / "broken.png").write_bytes(Path(tmp_path / "a.png").read_bytes()[:50])
    records = [talk("<image>", str(number), image="a.png") for number in range(10)]
    records += [talk("<image>", "10", image="broken.png"), talk("word " * 200, "11")]
    return data_file([*records, talk("q", "")])


@pytest.fixture(scope="module")
def write_parquet(tmp_path_factory):
    """Writes a table to a new file and returns its reader."""
    folder, numbers = tmp_path_factory.mktemp("parquet"), itertools.count()

    def write(table, **options):
        path = str(folder / f"{next(numbers)}.parquet")
        if not isinstance(table, bytes):
            pq.write_table(
                table if isinstance(table, pa.Table) else pa.table(table), path, **options
            )
        else:
            (folder / path).write_bytes(table)
        return ParquetFile(path)

    return write


@pytest.fixture(params=["small groups", "large groups"])
def size_of_groups(request, monkeypatch):
    """Makes the reader treat all row groups as small or as large ones."""
    if request.param == "large groups":
        monkeypatch.setattr(parquet_files, "_CACHED_GROUP", 0)
        monkeypatch.setattr(parquet_files, "_BATCH", 500)  # bytes, so that there are several
