"""Expert load over prompts, on one device and sharded."""

import numpy as np
import pytest

from moddistill.config import MeshConfig
from moddistill.convert.resolve import load
from moddistill.distributed.sharding import make_mesh
from moddistill.evals.expert_load import expert_load
from moddistill.inference import batching
from moddistill.inference.prompts import Prompt

PROMPTS = [Prompt(question) for question in ("what is it?", "is it red or blue?", "why?")]


def shares(model, tokenizer):
    return np.array([layer["text"] for layer in expert_load(*model, tokenizer, PROMPTS)])


@pytest.mark.parametrize(
    ("rows", "mesh"), [(2, None), (256, MeshConfig(data=1, fsdp=2, expert=2, tensor=2))]
)
def test_expert_load_does_not_depend_on_batches_and_devices(
    tiny_models, tokenizer, monkeypatch, rows, mesh
):
    expected = shares(load(tiny_models["sparse"]), tokenizer)
    assert len(np.unique(expected)) > 4
    monkeypatch.setattr(batching, "MAX_ROWS", rows)
    model = load(tiny_models["sparse"], mesh=mesh and make_mesh(mesh))
    np.testing.assert_allclose(shares(model, tokenizer), expected, rtol=1e-6)
