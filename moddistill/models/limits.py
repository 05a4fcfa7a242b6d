"""Ranges of a model's sizes, checked before arrays of these sizes are allocated.

Upper bounds are far above published models: they keep a corrupt file from exhausting memory.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from moddistill.errors import UserError, invalid
from moddistill.models.decoder import DecoderConfig
from moddistill.models.moe.layer import MAX_EXPERTS, check_moe
from moddistill.models.projector import projector_depth
from moddistill.models.vision import VisionConfig
from moddistill.models.vlm import ModelConfig

# Upper bounds. Values must be > 0, and integers unless the bound is a float.
DECODER = {
    "vocab_size": 10_000_000,
    "hidden_size": 100_000,
    "intermediate_size": 1_000_000,
    "num_layers": 1_000,
    "num_heads": 10_000,
    "num_kv_heads": 10_000,
    "head_dim": 10_000,
    "rope_theta": 1e12,
    "norm_eps": 1.0,
}
EXPERTS = {"num_experts": MAX_EXPERTS, "top_k": MAX_EXPERTS, "moe_intermediate_size": 1_000_000}
VISION = {
    "image_size": 10_000,
    "patch_size": 1_000,
    "hidden_size": 100_000,
    "intermediate_size": 1_000_000,
    "num_layers": 1_000,
    "num_heads": 10_000,
    "norm_eps": 1.0,
}
LARGEST_ID = 10_000_000
LARGEST_CONTEXT = 1_000_000_000  # tokens
_PATCHES = 100_000
_SMALLEST_STD = 1e-6  # pixels are divided by it
_EXPERTS_OF_ALL_LAYERS = 50_000
_SEGMENTS = 100  # each is traced and compiled separately

Spell = Callable[[str], str]


def spelt(limits: Mapping[str, int | float], names: Mapping[str, str]) -> dict[str, int | float]:
    """Limits by the names of a config's fields; `names` maps limits to fields."""
    return {field: limits[name] for name, field in names.items()}


def check_numbers(
    values: Mapping[str, Any], limits: Mapping[str, int | float], origin: str, spell: Spell = str
) -> None:
    """Raises UserError for values that are not numbers > 0 and <= their limit.

    Args:
      spell: from a name in `limits` to that of the field in `origin`.
    """
    for name, largest in limits.items():
        value = values.get(name)
        accepted = (int, float) if isinstance(largest, float) else (int,)
        # `type`, since bool is a subclass of int. NaN fails the comparison.
        if type(value) not in accepted or not 0 < value <= largest:
            kind = "a number" if float in accepted else "an integer"
            raise invalid(f"{origin}: {spell(name)}", value, f"{kind} > 0 and <= {largest:,}")


def check_architecture(config: ModelConfig, origin: str) -> None:
    """Raises UserError for sizes that are out of range or do not fit each other.

    Fields are named as in `config`, such as `decoder.num_layers`.
    """
    check_decoder(config.decoder, origin, "decoder.{}".format)
    if config.vision is not None:
        check_vision(config.vision, origin, "vision.{}".format)
    if not 0 <= config.image_token_id <= LARGEST_ID:
        raise invalid(f"{origin}: image_token_id", config.image_token_id, f"0 to {LARGEST_ID:,}")
    if any(start <= config.image_token_id < stop for start, stop in config.decoder.real_ids):
        raise invalid(f"{origin}: image_token_id", config.image_token_id, "an id outside real_ids")
    if not 0 <= config.context <= LARGEST_CONTEXT:
        raise invalid(f"{origin}: context", config.context, f"0 to {LARGEST_CONTEXT:,}")
    _with_origin(origin, projector_depth, config.projector)


def check_decoder(config: DecoderConfig, origin: str, spell: Spell = str) -> None:
    """Raises UserError for sizes of a decoder; see `check_architecture`."""
    check_numbers(vars(config), DECODER, origin, spell)
    _check_divides("num_kv_heads", "num_heads", config, origin, spell)
    if config.head_dim % 2:
        expected = "an even number, since rotary positions rotate pairs"
        raise invalid(f"{origin}: {spell('head_dim')}", config.head_dim, expected)
    _check_ids(config, f"{origin}: {spell('real_ids')}")
    if config.moe is not None:
        _check_experts(config, origin)


def _check_divides(
    part: str, whole: str, config: DecoderConfig | VisionConfig, origin: str, spell: Spell
) -> None:
    divisor, number = getattr(config, part), getattr(config, whole)
    if number % divisor:
        expected = f"a divisor of {spell(whole)}, {number}"
        raise invalid(f"{origin}: {spell(part)}", divisor, expected)


def _check_ids(config: DecoderConfig, field: str) -> None:
    """Raises UserError unless `real_ids` are ranges in ascending order, each id with a row."""
    edges = [edge for pair in config.real_ids for edge in pair]
    is_whole = all(type(edge) is int for edge in edges) and len(edges) == 2 * len(config.real_ids)
    # Strictly increasing edges: ranges are not empty, in order, and neither overlap nor touch.
    if not (edges and is_whole and edges[0] >= 0 and edges[-1] <= config.vocab_size) or any(
        first >= second for first, second in itertools.pairwise(edges)
    ):
        expected = (
            "ranges (first, last + 1) in ascending order, not adjacent, within 0 to vocab_size, "
            f"{config.vocab_size}"
        )
        raise invalid(field, config.real_ids, expected)


def _check_experts(config: DecoderConfig, origin: str) -> None:
    moe = config.moe
    # A `moe_intermediate_size` of 0 means that of the dense layers, hence its own range.
    limits = {name: EXPERTS[name] for name in EXPERTS if name != "moe_intermediate_size"}
    check_numbers(vars(moe), limits, origin, "moe.{}".format)
    if not 0 <= moe.moe_intermediate_size <= EXPERTS["moe_intermediate_size"]:
        expected = f"0 to {EXPERTS['moe_intermediate_size']:,}"
        raise invalid(f"{origin}: moe.moe_intermediate_size", moe.moe_intermediate_size, expected)
    _with_origin(origin, check_moe, moe)
    count = moe.num_experts * len(_with_origin(origin, lambda: config.moe_layers))
    if count > _EXPERTS_OF_ALL_LAYERS:
        expected = f"at most {_EXPERTS_OF_ALL_LAYERS:,} experts in all layers, not {count:,}"
        raise invalid(f"{origin}: moe.num_experts", moe.num_experts, expected)
    if len(config.plan) > _SEGMENTS:
        expected = f"at most {_SEGMENTS} segments of equal layers, not {len(config.plan)}"
        raise invalid(f"{origin}: moe.placement", moe.placement, expected)


def check_vision(config: VisionConfig, origin: str, spell: Spell = str) -> None:
    """Raises UserError for sizes of a vision encoder; see `check_architecture`."""
    check_numbers(vars(config), VISION, origin, spell)
    _check_divides("num_heads", "hidden_size", config, origin, spell)
    if not 0 < config.patches <= _PATCHES:
        expected = (
            f"1 to {_PATCHES:,} patches of images of {config.image_size} pixels, not "
            f"{config.patches:,}"
        )
        raise invalid(f"{origin}: {spell('patch_size')}", config.patch_size, expected)
    check_pixels(config.mean, f"{origin}: {spell('mean')}")
    check_pixels(config.std, f"{origin}: {spell('std')}", above_zero=True)


def check_pixels(values: Any, field: str, above_zero: bool = False) -> None:
    """Raises UserError unless there are three numbers from 0 to 1, one for each channel."""
    least, kind = (_SMALLEST_STD, "> 0 and <= 1") if above_zero else (0.0, "from 0 to 1")
    is_right = isinstance(values, list | tuple) and len(values) == 3
    if not is_right or any(type(x) not in (int, float) or not least <= x <= 1 for x in values):
        raise invalid(field, values, f"three numbers {kind}")


def _with_origin(origin: str, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
