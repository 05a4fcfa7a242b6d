"""Parameters as `{path: array}`, addressed by patterns that must match something.

A path joins the keys of the nested dict with `/`; a pattern is a regular expression that matches a
whole path. Freezing, weight decay and partial loading are functions over these.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from moddistill.errors import UserError, invalid

Flat = dict[str, Any]


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
            raise UserError(
                f"{origin}: pattern {pattern!r} matches no parameter; paths begin with {parts}, "
                f"for example {sorted(paths)[0]!r}"
            )
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


_ALWAYS_FLOAT32 = ("router", "scale", "blend", "blend_bias")


def cast_frozen(params: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Parameters as they are kept when they do not train, such as a teacher's.

    Small ones that take part in float32 arithmetic keep it.
    """

    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32 if path[-1].key in _ALWAYS_FLOAT32 else dtype)

    return jax.tree_util.tree_map_with_path(cast, params)
