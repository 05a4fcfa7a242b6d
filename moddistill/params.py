"""Parameters as `{path: array}`: their named groups, and functions over paths.

A path joins the keys of the nested dict with `/`; a pattern is a regular expression that matches an
entire path, and must match at least one. Freezing, weight decay, precision, quantization and
partial loading are functions over these.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from moddistill.errors import UserError, invalid

Flat = dict[str, Any]

# Each parameter of a model is in exactly one group.
GROUPS: dict[str, str] = {
    "kernels": r".*/kernel",
    "experts": r"decoder/.*/moe/experts_(gate|up|down)",
    "routers": r"decoder/.*/moe/(router|blend|blend_bias)",
    "embeddings": r"decoder/(embedding|head)",
    "positions": r"vision/(positions|class_token)",
    "norms": r".*/scale",
    "biases": r".*/bias",
}
# Small parameters of float32 arithmetic: bfloat16 flips routers' near ties.
FLOAT32_GROUPS = ("routers", "norms")
DECAYED_GROUPS = ("kernels", "experts", "embeddings")

# Parts of a model, as `config.trainable` names them; unlike groups they overlap.
LANGUAGE_MODEL = r"decoder/.*"
PROJECTOR = r"projector/.*"
EXPERT_LAYERS = r"decoder/.*/moe/.*"
DENSE_LAYERS = r"decoder/.*/mlp/.*"
DECODER_LAYERS = r"decoder/segment_\d+/.*"
# Stored so that a published vision encoder can be exported again; no feature depends on them.
NEVER_COMPUTED = r"vision/(unused|post_norm)/.*"


def flatten(params: dict[str, Any]) -> Flat:
    """Nested dict to `{path: leaf}`."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: Flat) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def match(paths: Sequence[str], patterns: Sequence[str], origin: str) -> set[str]:
    """The paths that any pattern matches; UserError if one of the patterns matches none.

    Args:
      origin: where the patterns come from, for the message.
    """
    found: set[str] = set()
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise invalid(origin, pattern, f"regular expressions of paths ({error})") from None
        hits = {path for path in paths if re.fullmatch(pattern, path)}
        if not hits:
            parts = sorted({path.split("/")[0] for path in paths})
            expected = (
                f"a pattern of parameter paths, such as {min(paths)!r} (first parts: {parts})"
            )
            raise invalid(origin, pattern, expected)
        found |= hits
    return found


def split(params: dict[str, Any], chosen: set[str]) -> tuple[Flat, Flat]:
    """Flat parameters whose path is in `chosen`, and the rest."""
    flat = flatten(params)
    inside = {path: leaf for path, leaf in flat.items() if path in chosen}
    outside = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return inside, outside


def merge(*parts: Flat) -> dict[str, Any]:
    """One nested dict from flat parts."""
    return unflatten({path: leaf for part in parts for path, leaf in part.items()})


def count(params: Any) -> int:
    """Number of array elements."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def check_same(found: Flat, expected: Flat, origin: str) -> None:
    """Raises one UserError that lists every missing, unexpected and misshapen leaf."""
    lines = [
        f"missing {path} {expected[path].shape}" for path in sorted(expected.keys() - found.keys())
    ]
    lines += [
        f"unexpected {path} {found[path].shape}" for path in sorted(found.keys() - expected.keys())
    ]
    lines += [
        f"{path} has shape {found[path].shape}, expected {expected[path].shape}"
        for path in sorted(found.keys() & expected.keys())
        if tuple(found[path].shape) != tuple(expected[path].shape)
    ]
    if lines:
        raise UserError(f"{origin} does not fit the architecture:\n  " + "\n  ".join(lines))


def in_group(path: str, *groups: str) -> bool:
    """Returns whether a parameter is in one of these groups."""
    return any(re.fullmatch(GROUPS[group], path) for group in groups)


def is_computed(path: str) -> bool:
    """Returns whether any output depends on a parameter."""
    return not re.fullmatch(NEVER_COMPUTED, path)


def check_groups(paths: Iterable[str], required: Iterable[str]) -> None:
    """Checks that `GROUPS` partition the parameters of a model.

    Args:
      paths: of all parameters.
      required: groups that must have a parameter.

    Raises:
      ValueError: listing parameters of no group or of several, and required groups without any.
    """
    groups = {path: [name for name in GROUPS if in_group(path, name)] for path in paths}
    lines = [f"{path} is in {x or 'no group'}" for path, x in groups.items() if len(x) != 1]
    present = {name for found in groups.values() for name in found}
    lines += [f"no parameter is in {name!r}" for name in required if name not in present]
    if lines:
        raise ValueError("parameter groups:\n  " + "\n  ".join(lines))


def cast_frozen(params: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Parameters in the dtype of frozen ones, such as a teacher's; `FLOAT32_GROUPS` in float32."""
    return unflatten(
        {
            path: x.astype(jnp.float32 if in_group(path, *FLOAT32_GROUPS) else dtype)
            for path, x in flatten(params).items()
        }
    )
