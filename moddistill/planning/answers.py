"""Capacity planning of answers: memory, FLOPs, and the least time on chips that are not there.

`inference.decode.admit` reads a prompt and gives the first token; each `step` gives one more token
in every row. Memory beyond parameters and cache is that of these programs, compiled for the chip.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moddistill.config import Dtype, MeshConfig
from moddistill.distributed import accelerators, sharding
from moddistill.distributed.accelerators import CHIPS, GIB
from moddistill.inference.batching import cache_bytes_per_row
from moddistill.inference.decode import Rows, admit, empty_rows, step, without_drops
from moddistill.inference.placement import mesh_context
from moddistill.inference.prompts import bucket
from moddistill.inference.sampling import Sampling
from moddistill.models.batch import make_batch
from moddistill.models.flops import parameter_counts
from moddistill.models.layer_plan import unstack
from moddistill.models.vlm import ModelConfig, Vlm
from moddistill.planning.memory import USABLE_MEMORY, compile_program, peak_bytes
from moddistill.planning.roofline import (
    AnswerSize,
    Work,
    answer_compute,
    least_seconds,
    loaded_params,
    num_bytes,
    prefill_work,
    token_work,
)
from moddistill.training.program import with_shardings


def plan_answer(
    config: ModelConfig, size: AnswerSize, chips: Sequence[str], dtype: Dtype, compiled: bool
) -> dict[str, Any]:
    """Plans answers on chips.

    FLOPs are model FLOPs, without padding. Those of a token are of a step in the middle of the
    answers, which makes a token in every row.

    Args:
      chips: names in `accelerators.CHIPS`, or "cpu" for this machine, whose speed is not known.
      compiled: whether to compile the programs, which finds their temporary memory.

    Returns:
      A report for `format_answer`; "chips" has one for each of them.

    Raises:
      UserError: the compiler of a chip is not installed.
    """
    parameters, active = parameter_counts(config)
    cache = cache_bytes_per_row(config.decoder, answer_compute(dtype), size.slots)
    prefill, token = prefill_work(config, size, dtype), token_work(config, size, dtype)
    report = {
        "parameters": parameters,
        "active_parameters": active,
        "dtype": dtype,
        **size._asdict(),
        "parameter_bytes": sum(map(num_bytes, jax.tree.leaves(loaded_params(config, dtype)))),
        "cache_bytes": size.rows * cache,
        "prefill_flops": prefill.flops,
        "prefill_bytes": prefill.bytes,
        "token_flops": token.flops,
        "token_bytes": token.bytes,
        "answer_flops": prefill.flops + (size.new_tokens - 1) * token.flops,
    }
    held = report["parameter_bytes"] + report["cache_bytes"]
    found = {}
    for name in chips:
        temporary = temporary_bytes(config, size, name, dtype) if compiled else None
        found[name] = _memory(held, temporary, name) | _least_time(prefill, token, size, name)
        if compiled and temporary is None:
            found[name]["fits"] = False  # the compiler ran out of the chip's memory
    return report | {"chips": found}


def _memory(held: int, temporary: int | None, name: str) -> dict[str, Any]:
    """Returns the memory of one JAX device, and whether answers fit, if that is known.

    Args:
      held: bytes of parameters and cache, which stay in memory.
    """
    peak = None if temporary is None else held + temporary
    found = {"temp_bytes": temporary, "peak_bytes": peak, "fits": None}
    if name == "cpu":
        return found
    chip = CHIPS[name]
    found["allowed_bytes"] = allowed = round(chip.memory * USABLE_MEMORY) // chip.devices
    if held > allowed or peak is not None:
        found["fits"] = held <= allowed and peak <= allowed
    return found


def _least_time(prefill: Work, token: Work, size: AnswerSize, name: str) -> dict[str, float]:
    """Returns seconds of both programs and of all answers, at least; nothing for "cpu"."""
    if name == "cpu":
        return {}
    first, later = (least_seconds(work, CHIPS[name]) for work in (prefill, token))
    total = first + (size.new_tokens - 1) * later
    return {
        "prefill_seconds": first,
        "token_seconds": later,
        "answer_seconds": total,
        "tokens_per_second": size.rows * size.new_tokens / total,
    }


def temporary_bytes(config: ModelConfig, size: AnswerSize, name: str, dtype: Dtype) -> int | None:
    """Returns the memory of the compiled programs beyond parameters and cache, on a chip's device.

    None if the compiler runs out of the chip's memory.

    Raises:
      UserError: the compiler of the chip is not installed.
    """
    most = 0
    for lowered in lower_answer(config, size, name, dtype).values():
        program = compile_program(lowered, accelerators.one_chip(name))
        if program is None:
            return None
        # A program has no argument for parameters that it does not use; they stay in memory.
        memory = program.memory_analysis()
        most = max(most, peak_bytes(memory, name) - memory.argument_size_in_bytes)
    return most


def lower_answer(
    config: ModelConfig, size: AnswerSize, name: str, dtype: Dtype
) -> dict[str, jax.stages.Lowered]:
    """Returns the programs "prefill" and "token", as `generate` runs them, for a chip's device."""
    devices = accelerators.topology_devices(accelerators.one_chip(name))[:1]
    mesh = sharding.make_mesh(MeshConfig(), devices)
    model = without_drops(Vlm(config, answer_compute(dtype)))
    static = {"sampling": Sampling(), "top_logprobs": 0}

    def on_device(shapes: Any) -> Any:
        return with_shardings(shapes, jax.tree.map(lambda _: sharding.replicated(mesh), shapes))

    def empty() -> Rows:
        return empty_rows(model, size.rows, size.slots, Sampling())

    def prefill(params: Any, rows: list[Any], *prompts: Any) -> Any:
        return admit(model, params, _like(empty(), rows), *prompts, **static)

    def token(params: Any, rows: list[Any]) -> Any:
        return step(model, params, _like(empty(), rows), **static)

    # Outside of the mesh context, in which even a constant would be put on the device.
    params = on_device(answer_params(config, dtype))
    rows = on_device(jax.eval_shape(lambda: jax.tree.leaves(empty())))
    rngs = on_device(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size.rows)))
    at = on_device(jax.ShapeDtypeStruct((size.rows,), jnp.int32))
    batch = make_batch(
        jax.ShapeDtypeStruct,
        rows=size.rows,
        length=bucket(size.prompt_tokens),
        images=(size.images, config.vision.image_size) if size.images else None,
    )
    batch = on_device(batch._replace(loss_mask=None))
    with mesh_context(mesh):
        return {
            "prefill": jax.jit(prefill, donate_argnums=1).lower(params, rows, batch, at, rngs),
            "token": jax.jit(token, donate_argnums=1).lower(params, rows),
        }


def _like(tree: Any, leaves: list[Any]) -> Any:
    """The leaves in the structure of a tree, whose own are not used.

    Arguments are lists of leaves, since fields of `Rows` are arrays and never their shapes.
    """
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def answer_params(config: ModelConfig, dtype: Dtype) -> Any:
    """Shapes of the parameters as answers read them: each layer has arrays of its own."""
    params = loaded_params(config, dtype)
    layers = jax.eval_shape(lambda x: unstack(x, config.decoder.plan), params["decoder"])
    decoder = {
        name: x for name, x in params["decoder"].items() if not name.startswith("segment_")
    } | {f"segment_{i}": {"block_0": _stacked_once(layer)} for i, layer in enumerate(layers)}
    return params | {"decoder": decoder}


def _stacked_once(layer: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), layer)


def format_answer(report: dict[str, Any]) -> str:
    """Formats a report of `plan_answer` as lines of text, with a row for each chip."""
    lines = [
        f"answers    {report['rows']:9,} of {report['new_tokens']} tokens, {report['dtype']}",
        f"prompts    {report['prompt_tokens']:9,} tokens; images: {report['images']}",
        f"parameters {report['parameters'] / 1e9:9.3f} G, {report['active_parameters'] / 1e9:.3f} G"
        f" active; {report['parameter_bytes'] / GIB:.2f} GiB",
        f"cache      {report['cache_bytes'] / GIB:9.3f} GiB",
        f"prefill    {report['prefill_flops'] / 1e9:9,.1f} GFLOP, reads at least "
        f"{report['prefill_bytes'] / GIB:.2f} GiB",
        f"token      {report['token_flops'] / 1e9:9,.1f} GFLOP, reads at least "
        f"{report['token_bytes'] / GIB:.2f} GiB",
        "chip   temporary      peak  fits  prefill >=  token >=  answer >=  tokens/s <=",
    ]
    return "\n".join(lines + [_chip_row(name, chip) for name, chip in report["chips"].items()])


def _chip_row(name: str, chip: dict[str, Any]) -> str:
    gib = [chip[key] and f"{chip[key] / GIB:.2f} GiB" for key in ("temp_bytes", "peak_bytes")]
    fits = {True: "yes", False: "no", None: "-"}[chip["fits"]]
    cells = [f"{name:<6}", *(f"{each or '-':>9}" for each in gib), f"{fits:>5}"]
    if "token_seconds" in chip:
        times = (chip[f"{part}_seconds"] * 1e3 for part in ("prefill", "token", "answer"))
        widths = (8, 6, 7)
        cells += [f"{x:{width}.2f} ms" for x, width in zip(times, widths, strict=True)]
        cells.append(f"{chip['tokens_per_second']:12,.0f}")
    return " ".join(cells)
