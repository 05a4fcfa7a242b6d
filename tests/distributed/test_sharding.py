import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec

from moddistill.config import ExpertConfig, MeshConfig
from moddistill.distributed import sharding
from moddistill.distributed.sharding import (
    MESH_AXES,
    batch_sharding,
    device_kind,
    logical_to_mesh,
    make_mesh,
    param_shardings,
    put_batch,
)
from moddistill.models.compute import ComputeConfig
from moddistill.models.presets import PRESETS
from moddistill.models.upcycle import upcycle_config
from moddistill.models.vision import Vision, VisionConfig
from moddistill.models.vlm import abstract_params
from moddistill.params import flatten
from moddistill.planning.hlo_collectives import collectives
from moddistill.training.architectures import resolve_models
from moddistill.training.loading import prepare
from moddistill.training.program import with_shardings
from moddistill.training.stages import STAGES
from moddistill.training.streams import open_streams


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(fsdp=2), (4, 2, 1, 1)),
        (MeshConfig(data=2, fsdp=2, expert=-1), (2, 2, 2, 1)),
        (MeshConfig(data=1, tensor=8), (1, 1, 1, 8)),
    ],
)
def test_mesh_shape(config, shape):
    mesh = make_mesh(config)
    assert mesh.axis_names == MESH_AXES
    assert mesh.devices.shape == shape


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=3),
        MeshConfig(data=16),
        MeshConfig(data=4),
        MeshConfig(fsdp=3),
        MeshConfig(fsdp=-1),
        MeshConfig(fsdp=0),
        MeshConfig(fsdp=-2),
    ],
)
def test_mesh_that_does_not_fit_the_devices_is_an_error(config):
    with pytest.raises(ValueError, match=rf"product 8, .*data={config.data}, fsdp={config.fsdp}"):
        make_mesh(config)


def test_device_kind_of_a_mesh():
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert device_kind() == jax.devices()[0].device_kind
    assert device_kind() == jax.devices()[0].device_kind


@pytest.mark.parametrize("by_platform", [False, True])
def test_device_kind_without_a_mesh_is_that_of_the_default_device(monkeypatch, by_platform):
    """On a TPU machine, programs for the CPU must not get TPU kernels."""
    [cpu, *_], tpu = jax.devices(), types.SimpleNamespace(device_kind="TPU v5")
    monkeypatch.setattr(jax, "devices", lambda platform=None: [cpu if platform == "cpu" else tpu])
    assert device_kind() == "TPU v5"
    with jax.default_device("cpu" if by_platform else cpu):
        assert device_kind() == "cpu"


def test_unknown_logical_axis_is_an_error_with_a_suggestion():
    assert logical_to_mesh(PartitionSpec("router", None, "mlp")) == PartitionSpec(
        None, None, "tensor"
    )
    with pytest.raises(ValueError, match=r"^logical axis: .*got 'embedd' \(did you mean 'embed'"):
        logical_to_mesh(PartitionSpec("embedd"))


def test_embed_is_sharded_over_every_mesh_axis_that_no_other_dimension_uses():
    kernel, experts = ("embed", "mlp"), ("expert", "embed", "mlp")
    expected = PartitionSpec(("fsdp", "expert"), "tensor")
    assert logical_to_mesh(PartitionSpec(*kernel)) == expected
    assert logical_to_mesh(PartitionSpec(*experts)) == PartitionSpec("expert", "fsdp", "tensor")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("moe", [None, ExpertConfig(residual=True)], ids=["dense", "sparse"])
def test_every_kernel_of_the_decoder_is_sharded(name, moe):
    config = PRESETS[name] if moe is None else upcycle_config(PRESETS[name], moe)
    boxed = abstract_params(config)
    shardings = flatten(
        param_shardings(make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2)), boxed)
    )
    shapes = flatten(nn.unbox(boxed))
    assert shardings.keys() == shapes.keys()
    for path, shape in shapes.items():
        if path.startswith("decoder/") and shape.ndim > 2 and "/bias" not in path:
            assert any(shardings[path].spec), f"{path} {shape.shape} is replicated"
        shardings[path].shard_shape(shape.shape)  # raises where a dimension does not divide
    if moe:
        experts = {p: s for p, s in shardings.items() if "/experts_" in p}
        assert experts
        assert all(sharding.spec[1] == "expert" for sharding in experts.values())


def test_batch_is_sharded_over_all_devices():
    batch = {"tokens": np.arange(16).reshape(8, 2), "images": np.zeros((8, 1, 4, 4, 3), np.uint8)}
    arrays = put_batch(make_mesh(MeshConfig(data=4, fsdp=2)), batch)
    for name, array in arrays.items():
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {1}
        np.testing.assert_array_equal(array, batch[name])


def test_vision_encoder_gathers_its_kernels_and_no_activations():
    """64 samples on 8 devices: activations are larger than any kernel."""
    config = VisionConfig(
        image_size=56,
        patch_size=14,
        hidden_size=64,
        intermediate_size=128,
        num_layers=3,
        num_heads=2,
    )
    encoder = Vision(config, ComputeConfig(remat="full"))
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, expert=2))
    images = jax.ShapeDtypeStruct((64, 56, 56, 3), jnp.uint8, sharding=batch_sharding(mesh))
    boxed = jax.eval_shape(encoder.init, jax.random.key(0), images)
    params = with_shardings(sharding.unbox(boxed), param_shardings(mesh, boxed))
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(sharding.RULES.items())):
        found = collectives(jax.jit(encoder.apply).lower(params, images).compile().as_text())
    assert found.keys() == {"all-gather"}
    assert found["all-gather"]["bytes"] == 4 * sum(
        math.prod(x.shape) for path, x in flatten(params["params"]).items() if is_gathered(path, x)
    )


def is_gathered(path, x):
    computed = not path.startswith(("unused/", "post_norm/"))
    return computed and x.sharding.shard_shape(x.shape) != x.shape


def one_device_mesh():
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh((1,) * 4, MESH_AXES, devices=jax.devices()[:1], axis_types=axis_types)


def first_steps(config, mesh, workdir):
    """Returns parameters and metrics, and the state, after two steps of a stage on a mesh."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(sharding.RULES.items())):
        models = resolve_models(config)
        run = prepare(config, models, mesh)
        records = open_streams(config, models, mesh, workdir).training
        state = run.state
        for _ in range(2):
            state, metrics = run.step(state, run.teacher, put_batch(mesh, next(records)))
        assert run.step._cache_size() == 1, "the second step was compiled again"
    return jax.tree.map(np.asarray, (state.params, metrics)), state


@pytest.fixture(scope="module")
def steps(tiny_config, tiny_models, tmp_path_factory):
    """Runs two steps of a stage on a mesh, `sft` from random parameters, others from saved ones.

    eps is large, since Adam turns rounding errors of tiny gradients into steps of size lr.
    """
    teacher = str(tiny_models["teacher"])
    saved = {"init": ("dense", ""), "d2d": ("dense", teacher), "d2s": ("dense", teacher)}
    saved |= {"preference": ("sparse", teacher)}

    def run(stage, mesh, **more):
        config = tiny_config(
            stage, remat="none", optim={"eps": 1e-2, "lr": 0.1}, logits_chunk_size=64, **more
        )
        if stage in saved:
            student, teacher = saved[stage]
            config = dataclasses.replace(
                config,
                student=str(tiny_models[student]),
                teacher=teacher,
                tokenizer="",
                trainable="paper",
            )
        return first_steps(config, mesh, tmp_path_factory.mktemp("run"))

    return run


@pytest.fixture(scope="module")
def one_device(steps):
    """Returns parameters and metrics of a stage on a mesh of one device, cached."""
    return functools.cache(lambda stage: steps(stage, one_device_mesh())[0])


MESHES = {
    "8x1x1": MeshConfig(),
    "2x4x1": MeshConfig(data=2, fsdp=4),
    "2x1x4": MeshConfig(data=2, expert=4),
    "1x2x2x2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}


def assert_close(got, expected):
    (params, metrics), (expected_params, expected_metrics) = got, expected
    for path, value in params.items():
        np.testing.assert_allclose(value, expected_params[path], atol=1e-5, err_msg=path)
    for name, value in metrics.items():
        np.testing.assert_allclose(
            value, expected_metrics[name], rtol=1e-5, atol=1e-5, err_msg=name
        )


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("stage", STAGES)
def test_steps_are_invariant_to_the_mesh(steps, one_device, stage, mesh):
    got, state = steps(stage, make_mesh(MESHES[mesh]))
    assert_close(got, one_device(stage))
    if stage in ("d2s", "preference"):
        [experts] = {x.sharding.spec[1] for p, x in state.params.items() if "/experts_" in p}
        assert experts == "expert"


@pytest.mark.slow
def test_mesh_invariance_with_accumulation_int8_teacher_and_all_to_all(steps):
    more = {"grad_accum_steps": 2, "teacher_quantization": "int8"}
    got, _ = steps("d2s", make_mesh(MESHES["1x2x2x2"]), expert_transport="all_to_all", **more)
    expected, _ = steps("d2s", one_device_mesh(), **more)
    assert_close(got, expected)
