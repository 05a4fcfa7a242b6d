import json

import numpy as np
import pytest
from PIL import Image

from moddistill.data.tokenizer import load_tokenizer, train_bpe
from tests.data import qwen_ranks


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
