"""Timings of `benchmarks.device`: upper bounds of the device, and the library's layers and steps.

Each figure is the median of several rounds after a warm-up round. A round ends when the device has
finished (`block_until_ready`). Weights are random, dtypes as in training.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.device_inputs import on, random_batch, random_leaves, say
from moddistill.config import DataConfig, ExpertConfig, TrainConfig
from moddistill.distributed import sharding
from moddistill.distributed.accelerators import peak_flops
from moddistill.inference.decode import admit, empty_rows, step
from moddistill.inference.sampling import Sampling
from moddistill.models.compute import ComputeConfig
from moddistill.models.layer_plan import separate_layers
from moddistill.models.layers import SwiGLU
from moddistill.models.moe.layer import MoE, check_moe
from moddistill.models.presets import preset
from moddistill.models.upcycle import upcycle_config
from moddistill.models.vlm import Vlm, abstract_params
from moddistill.params import cast_frozen
from moddistill.training.program import with_shardings

GIB = 2**30
_STEPS = 10
_ROUNDS = 5
_WORDS = 64  # text tokens of a prompt, and tokens of an answer

Left = Callable[[], float]  # returns the seconds that remain


def median_seconds(run: Callable[[], Any], inner: int) -> float:
    """Returns the seconds of one call of `run`; each round queues `inner` calls."""
    jax.block_until_ready(run())
    rounds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        jax.block_until_ready([run() for _ in range(inner)])
        rounds.append((time.perf_counter() - began) / inner)
    return statistics.median(rounds)


def ceilings(device: Any, tiny: bool, left: Left) -> dict[str, Any]:
    """Measures the FLOP/s of a large bfloat16 matmul and the memory bandwidth."""
    size, words = (256, 2**16) if tiny else (8192, 2**29)
    with on(device):
        # Random, since constant data draws less power, which allows higher clocks than training.
        x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
        multiply = jax.jit(lambda x: x @ x)
        matmul = 2 * size**3 / median_seconds(lambda: multiply(x), 10)
        y = jnp.zeros(words, jnp.bfloat16)
        add = jax.jit(lambda y: y + 1)
        copy = 2 * y.nbytes / median_seconds(lambda: add(y), 3)
    peak = peak_flops([device])
    share = f", {matmul / peak:.0%} of the stated peak" if peak else ""
    table = [
        [f"bfloat16 matmul of {size:,} x {size:,}", f"{matmul / 1e12:.1f} TFLOP/s{share}"],
        ["memory, reading and writing", f"{copy / 1e9:,.0f} GB/s"],
    ]
    return {"matmul_flops": matmul, "copy_bytes_per_second": copy, "peak": peak, "table": table}


def expert_layer(device: Any, tiny: bool, left: Left) -> dict[str, Any]:
    """Times the student's expert layer against a dense layer of the same FLOPs, with gradients."""
    config = check_moe(ExpertConfig())
    decoder = preset("tiny" if tiny else "qwen1.5-1.8b").decoder
    width, mlp, tokens = decoder.hidden_size, decoder.intermediate_size, 256 if tiny else 16_384
    with on(device):
        x = jax.random.normal(jax.random.key(0), (1, tokens, width), jnp.bfloat16)
        flags = (jnp.ones((1, tokens), bool), jnp.zeros((1, tokens), bool))
        sparse = MoE(
            config=config, intermediate_size=mlp, compute=ComputeConfig(dtype=jnp.bfloat16)
        )
        dense = SwiGLU(config.top_k * mlp, jnp.bfloat16)
        seconds = {}
        for name, layer, rest in (("experts", sparse, flags), ("dense", dense, ())):
            params = jax.jit(layer.init)(jax.random.key(1), x, *rest)

            def loss(params: Any, x: Any, layer: Any = layer, rest: Any = rest) -> Any:
                output = layer.apply(params, x, *rest)
                output = output[0] if rest else output
                return jnp.sum(output.astype(jnp.float32) ** 2)

            step = jax.jit(jax.grad(loss, argnums=(0, 1)))
            seconds[name] = median_seconds(lambda s=step, p=params: s(p, x), 1 if tiny else 4)
    flops = 18.0 * tokens * width * config.top_k * mlp
    ratio = seconds["experts"] / seconds["dense"]
    table = [
        f"expert layer, {tokens:,} tokens, {width:,} x {mlp:,}, forward and backward",
        f"{1000 * seconds['experts']:.2f} ms, {flops / seconds['experts'] / 1e12:.1f} TFLOP/s; "
        f"a dense layer of the same FLOPs {1000 * seconds['dense']:.2f} ms, "
        f"{flops / seconds['dense'] / 1e12:.1f} TFLOP/s; ratio {ratio:.2f}",
    ]
    return {"seconds": seconds, "flops": flops, "ratio": ratio, "table": [table]}


def decoding(device: Any, tiny: bool, left: Left) -> dict[str, Any]:
    """Times greedy decoding of the sparse and the dense student for prompts with an image."""
    dense = preset("tiny" if tiny else "qwen1.5-1.8b")
    models = {"sparse": upcycle_config(dense, ExpertConfig()), "dense": dense}
    results, table = {}, []
    for name, config in models.items():
        for rows in (1, 32):
            key = f"{name}, batch {rows}"
            if left() <= 0:
                results[key] = {"skipped": "out of time"}
                table.append([f"decoding, {key}", "skipped, out of time"])
                continue
            results[key] = _decode(config, rows, device)
            table.append(_describe_decoding(key, results[key]))
            say(f"  {': '.join(table[-1])}")
    return {"results": results, "table": table}


def _decode(config: Any, rows: int, device: Any) -> dict[str, Any]:
    """Returns seconds of prefill and of each new token, computed from answers of two lengths."""
    model = Vlm(config, ComputeConfig(dtype=jnp.bfloat16, stacked=False))
    length = config.vision.patches + _WORDS
    with on(device) as mesh:
        shapes = jax.eval_shape(
            lambda x: cast_frozen(x, jnp.bfloat16), sharding.unbox(abstract_params(config))
        )
        everywhere = jax.tree.map(lambda _: sharding.replicated(mesh), shapes)
        params = random_leaves(with_shardings(shapes, everywhere), 0)
        params["decoder"] |= separate_layers(params["decoder"], config.decoder.plan)
        settings = TrainConfig(batch_size=rows, data=DataConfig(max_length=length, packing=False))
        batch = random_batch(settings, config, mesh, full=True)
        batch = sharding.put_batch(mesh, batch)
        seconds = {}
        for new in (2, _WORDS + 2):

            def run(new: int = new) -> Any:
                """Answers of full length, since nothing here stops at an end token."""
                static = {"sampling": Sampling(), "top_logprobs": 0}
                state = empty_rows(model, rows, length + new, Sampling())
                rngs = jax.random.split(jax.random.key(0), rows)
                state, _ = admit(model, params, state, batch, jnp.arange(rows), rngs, **static)
                for _ in range(new - 1):
                    state, choice = step(model, params, state, **static)
                return choice

            seconds[new] = median_seconds(run, 1)
    token = (seconds[_WORDS + 2] - seconds[2]) / _WORDS
    return {
        "rows": rows,
        "prompt_tokens": length,
        "prefill_seconds": seconds[2] - token,
        "token_seconds": token,
        "tokens_per_second": rows / token,
    }


def _describe_decoding(key: str, figures: dict[str, Any]) -> list[str]:
    prefill = f"prefill {1000 * figures['prefill_seconds']:.1f} ms"
    what = f"decoding, {key}, {figures['prompt_tokens']} prompt tokens each"
    return [what, f"{prefill}; {figures['tokens_per_second']:,.1f} tokens/s"]
