import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import MeshConfig, SourceConfig
from moddistill.distributed.sharding import make_mesh
from moddistill.planning.content import step_content
from moddistill.training.architectures import resolve_models
from moddistill.training.program import SUPERVISED_SHARE, full_step_size
from moddistill.training.step import content_metrics
from moddistill.training.streams import open_streams


def batches(config, models, workdir):
    """Returns all batches of a run as the pipeline makes them."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    stream = open_streams(config, models, mesh, workdir).training
    return [jax.tree.map(jnp.asarray, next(stream)) for _ in range(config.steps)]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("steps", [3, 0])
def test_content_is_the_mean_of_the_batches_of_the_run(steps, packing, tiny_config, tmp_path):
    config = tiny_config("sft", batch_size=2, steps=steps, epochs=1.0, data={"packing": packing})
    models = resolve_models(config)
    content = step_content(config, models.student_config)
    assert content.steps == steps or content.steps > 3
    config = dataclasses.replace(config, steps=content.steps)
    made = batches(config, models, tmp_path)
    metrics = [content_metrics(batch, models.student_config) for batch in made]
    found = {name: np.mean([each[name][0] for each in metrics]) for name in metrics[0]}
    assert content.size.tokens == pytest.approx(found["tokens"], rel=1e-6)
    assert content.size.squared_lengths == pytest.approx(found["squared_lengths"], rel=1e-6)
    assert content.size.images == pytest.approx(found["images"])
    assert content.samples == pytest.approx(found["samples"])
    assert content.padding == pytest.approx(found["padding"] / (2 * config.data.max_length))
    assert content.size.supervised == content.size.tokens * SUPERVISED_SHARE


def test_both_sides_of_pairs_count(tiny_config, tiny_models, tmp_path):
    config = tiny_config(
        "preference",
        batch_size=2,
        student=str(tiny_models["sparse"]),
        tokenizer="",
        teacher=str(tiny_models["teacher"]),
    )
    models = resolve_models(config)
    content = step_content(config, models.student_config)
    metrics = [content_metrics(x, models.student_config) for x in batches(config, models, tmp_path)]
    tokens, samples, images = (
        np.mean([each[name][0] for each in metrics]) for name in ("tokens", "samples", "images")
    )
    assert tokens <= content.size.tokens < 1.1 * tokens  # the longer side, twice
    assert (content.samples, content.size.images) == pytest.approx((samples, images))


def test_rows_are_full_if_the_records_are_not_here(tiny_config, tmp_path):
    config = tiny_config("sft", steps=0, epochs=1.0)
    models = resolve_models(config)
    source = SourceConfig(str(tmp_path / "*.parquet"))
    gone = dataclasses.replace(config, data=dataclasses.replace(config.data, sources={"a": source}))
    content = step_content(gone, models.student_config)
    assert content == (full_step_size(gone, models.student_config), None, None, 0)
