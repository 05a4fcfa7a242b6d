"""Checks of `benchmarks.device`: results of the device against those of the CPU.

Operations: values and gradients are compared with a plain form on the CPU and, on an accelerator,
with the same operation on the CPU. Stages: one step is compared with a step on the CPU that neither
scans nor rematerialises its layers and holds all logits at once. Compared are metrics, gradients
(Adam's first moments after one step) and updated parameters.

Bounds are on `||found - expected|| / ||expected||` of each array. float32 runs at the highest
matmul precision, bfloat16 as in training.
"""

import dataclasses
import functools
import math
import os
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.device_inputs import on, random_batch, say
from benchmarks.device_operations import Operation, operations
from moddistill.config import DataConfig, OptimConfig, TrainConfig
from moddistill.distributed import sharding
from moddistill.models.moe import grouped_matmul
from moddistill.models.vlm import ModelConfig, abstract_params
from moddistill.params import flatten, unflatten
from moddistill.planning.planner import architectures
from moddistill.training.program import make_program
from moddistill.training.stages import STAGES

# bfloat16 has 8 bits of precision: one rounding is off by up to 0.4 %, and a layer has several.
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2}
# In bfloat16 only metrics are compared. The CPU's own error is up to 1.6 % (norm of gradients).
STEP_BOUNDS = {"float32": 1e-4, "bfloat16": 5e-2}
_FLOOR = 1e-2  # fraction of the norm of all arrays, below which an array is mostly rounding error

Check = dict[str, Any]


def check_operations(device: Any, tiny: bool, left: Callable[[], float]) -> dict[str, Any]:
    """Compares losses, attention and the expert layer, values and gradients.

    Args:
      tiny: uses small arrays in place of the sizes of real models.
      left: seconds that remain; checks that have not started by then are skipped.
    """
    items = [(x.name, functools.partial(_operation, x, device)) for x in operations(tiny)]
    checks = _in_threads(items, left)
    with on(device):
        experts = grouped_matmul.kernel_name()
    return _summary(checks) | {"experts": experts, "table": [*_rows(checks), ["experts", experts]]}


def check_stages(device: Any, tiny: bool, left: Callable[[], float]) -> dict[str, Any]:
    """Compares one step of every stage with tiny models; on a CPU in float32 only."""
    dtypes = ("float32",) if tiny else ("float32", "bfloat16")
    items = [(f"step of {x}", functools.partial(_stage, x, dtypes, device)) for x in STAGES]
    checks = _in_threads(items, left)
    return _summary(checks) | {"table": _rows(checks)}


def _in_threads(items: list[Any], left: Callable[[], float]) -> list[Check]:
    """Runs the checks of all items `(name, run)` in threads, since compilation uses one core."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda item: _isolated(*item, left), items)
        return [check for checks in results for check in checks]


def _isolated(name: str, run: Callable[[], list[Check]], left: Callable[[], float]) -> list[Check]:
    """Runs the checks of one item: skipped without time, failed with a traceback if it raises."""
    if left() <= 0:
        checks = [{"name": name, "skipped": "out of time"}]
    else:
        try:
            checks = run()
        except Exception as error:  # the other items must still run
            say(traceback.format_exc())
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            checks = [{"name": name, "raised": line, "traceback": traceback.format_exc()}]
    for check in checks:
        say(f"  {name}: {describe(check)}")
    return checks


def describe(check: Check) -> str:
    """Returns the result of a check in one line."""
    if "skipped" in check:
        return f"skipped, {check['skipped']}"
    if "raised" in check:
        return f"raised {check['raised']}"
    kernel = f" by {check['kernel']}" if check.get("kernel") else ""
    word = "" if check["passed"] else "FAILED, "
    return (
        f"{word}{check['dtype']}{kernel} against {check['against']}: {float(check['error']):.1e} "
        f"in {check['where']} (at most {check['bound']:.0e})"
    )


def _summary(checks: list[Check]) -> dict[str, Any]:
    """Summarises checks as failed, incomplete (some did not run) or passed."""
    failed = sum(not (check.get("passed") or "skipped" in check) for check in checks)
    complete = "incomplete" if any("skipped" in check for check in checks) else "passed"
    return {"status": "failed" if failed else complete, "failed": failed, "checks": checks}


def _rows(checks: list[Check]) -> list[list[str]]:
    """Returns table rows: the largest error per item and dtype, and every check without a pass."""
    worst: dict[tuple[Any, ...], Check] = {}
    for check in checks:
        key = (check["name"], check.get("dtype"), check.get("passed"))
        pair = (worst.get(key, check), check)
        worst[key] = max(pair, key=lambda check: float(check.get("error", 0)))
    return [[check["name"], describe(check)] for check in worst.values()]


def relative_errors(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Returns `||found - expected|| / ||expected||` of each array by path.

    If the norm of an array is below `_FLOOR` times the norm of all arrays, the error is relative
    to that floor.
    """
    expected = {path: np.asarray(x, np.float64) for path, x in expected.items()}
    whole = math.sqrt(sum(float(np.sum(x * x)) for x in expected.values()))
    errors = {}
    for path, x in expected.items():
        difference = np.linalg.norm(np.asarray(found[path], np.float64) - x)
        scale = max(np.linalg.norm(x), _FLOOR * whole, np.finfo(np.float32).tiny)
        errors[path] = float(difference / scale)
    return errors


def verdict(name: str, dtype: str, against: str, errors: dict[str, float], bound: float) -> Check:
    """Returns a check that passes if all errors are finite and within the bound."""
    where, error = max(errors.items(), key=lambda item: np.nan_to_num(item[1], nan=np.inf))
    return {
        "name": name,
        "dtype": dtype,
        "against": against,
        "error": error if math.isfinite(error) else str(error),  # JSON has no infinity
        "bound": bound,
        "where": where,
        "passed": error <= bound,
    }


def _operation(operation: Operation, device: Any) -> list[Check]:
    """Compares one operation with its plain form and, on an accelerator, with itself on the CPU."""
    [cpu, *_] = jax.devices("cpu")
    arrays = (operation.inputs, operation.constants)
    references = {"its plain form": _evaluate(operation.plain, *arrays, cpu, "highest")[0]}
    if device.platform != "cpu":
        ours = functools.partial(operation.ours, dtype=jnp.float32)
        references["the CPU"] = _evaluate(ours, *arrays, cpu, "highest")[0]
    checks = []
    for dtype in operation.dtypes:
        ours = functools.partial(operation.ours, dtype=jnp.dtype(dtype))
        precision = "highest" if dtype == "float32" else None
        found, kernel = _evaluate(ours, *arrays, device, precision)
        for against, expected in references.items():
            errors = relative_errors(found, expected)
            check = verdict(operation.name, dtype, against, errors, BOUNDS[dtype])
            checks.append(check | ({"kernel": kernel} if "attention" in operation.name else {}))
    return checks


def _evaluate(
    function: Callable, inputs: Any, constants: Any, device: Any, precision: str | None
) -> tuple[dict[str, np.ndarray], str]:
    """Returns value and gradients of an operation, and whether it used cuDNN's attention.

    The cotangent is random and the same for all forms and devices.
    """
    with on(device, precision) as mesh:
        shape = jax.eval_shape(function, inputs, constants).shape
        cotangent = np.random.default_rng(4).standard_normal(shape, np.float32)

        def run(inputs: Any, constants: Any, cotangent: Any) -> dict[str, Any]:
            value, pull = jax.vjp(lambda x: function(x, constants), inputs)
            gradients = pull(cotangent)[0]
            return {"value": value} | {f"gradient of {name}": x for name, x in gradients.items()}

        arguments = jax.device_put((inputs, constants, cotangent), sharding.replicated(mesh))
        compiled = jax.jit(run).lower(*arguments).compile()
        found = jax.device_get(compiled(*arguments))
    fused = device.platform == "gpu" and "cudnn$fmha" in compiled.as_text()
    return found, "cuDNN" if fused else "XLA"


def _stage(stage: str, dtypes: tuple[str, ...], device: Any) -> list[Check]:
    """Compares the training step of a stage with an unrolled step on the CPU in float32."""
    config = _stage_config(stage)
    [cpu, *_] = jax.devices("cpu")
    params = tuple(_initial_params(model, seed) for seed, model in enumerate(_models(config)))
    positions = config.batch_size * 2 * config.data.max_length
    plain = dataclasses.replace(
        config, scan=False, remat="none", donate=False, logits_chunk_size=positions
    )
    expected = _one_step(plain, params, cpu)
    checks = []
    for dtype in dtypes:
        found = _one_step(dataclasses.replace(config, dtype=dtype), params, device)
        errors = {}
        for name, x in expected["metrics"].items():
            errors |= relative_errors(found["metrics"], {name: x})
        if dtype == "float32":  # in bfloat16, gradients of so small a model are mostly rounding
            for part in ("gradients", "parameters"):
                errors |= relative_errors(found[part], expected[part])
        name = f"step of {stage}"
        checks.append(verdict(name, dtype, "the CPU, unrolled", errors, STEP_BOUNDS[dtype]))
    return checks


def _stage_config(stage: str) -> TrainConfig:
    return TrainConfig(
        stage=stage,
        student="random:tiny",
        teacher="random:tiny-teacher" if STAGES[stage].teacher else "",
        steps=4,
        batch_size=4,
        dtype="float32",
        data=DataConfig(max_length=32, packing=False),
        # Gradients of key biases are rounding errors of 0, which a smaller `eps` would amplify.
        optim=OptimConfig(lr=1e-3, warmup_ratio=0.0, eps=1e-6),
        logits_chunk_size=8,
    )


def _models(config: TrainConfig) -> tuple[ModelConfig, ModelConfig | None]:
    """Returns student and teacher with a head dimension of 8, which cuDNN supports."""
    return tuple(map(_with_head_dim_8, architectures(config)))


def _with_head_dim_8(model: ModelConfig | None) -> ModelConfig | None:
    if model is None:
        return None
    return dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, head_dim=8))


def _initial_params(model: ModelConfig | None, seed: int) -> Any:
    """Returns random float32 parameters as numpy arrays, with nearly equal experts.

    A token close to a tie may choose another expert on the device; with nearly equal experts this
    changes its output little.
    """
    if model is None:
        return None
    rng = np.random.default_rng(seed)
    params = {}
    for path, x in flatten(sharding.unbox(abstract_params(model))).items():
        if path.endswith("/scale"):
            params[path] = np.ones(x.shape, np.float32)
            continue
        params[path] = 0.2 * rng.standard_normal(x.shape, np.float32)
        if "/experts_" in path:  # [layers, experts, inputs, outputs]
            params[path] = params[path][:, :1] + 0.1 * params[path]
    return unflatten(params)


def _one_step(config: TrainConfig, params: tuple[Any, Any], device: Any) -> dict[str, Any]:
    """Runs the first step; returns metrics, first moments and parameters by path."""
    student, teacher = _models(config)
    with on(device, "highest" if config.dtype == "float32" else None) as mesh:
        program = make_program(config, student, teacher, mesh)
        state = jax.jit(program.make_state, out_shardings=program.state_shardings)(params[0])
        taught = jax.tree.map(
            lambda x, shape: jax.device_put(x.astype(shape.dtype), shape.sharding),
            params[1],
            program.teacher,
        )
        batch = sharding.put_batch(mesh, random_batch(config, student, mesh, full=False))
        state, metrics = jax.device_get(program.step(state, taught, batch))
    gradients = optax.tree.get(state.opt_state, "mu")
    return {
        "metrics": {name: total / weight for name, (total, weight) in metrics.items()},
        "gradients": {f"gradient of {path}": x for path, x in gradients.items()},
        "parameters": {f"updated {path}": x for path, x in state.params.items()},
    }
