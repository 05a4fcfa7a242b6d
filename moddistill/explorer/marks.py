"""How each token is marked: by its expert of a choice, or by the entropy of its router."""

import dataclasses
import math
from collections.abc import Sequence

from moddistill.explorer.markup import percent
from moddistill.explorer.routing import Routing

ENTROPY = -1  # in place of a choice
COLORS, TEXTURES = 8, 3  # of experts in the style sheet; together they tell 24 apart
# Dark blue to yellow with a lightness that grows evenly, after cividis (Nuñez et al. 2018).
_RAMP = ((0, 34, 78), (124, 123, 120), (254, 232, 56))


@dataclasses.dataclass(frozen=True)
class Mark:
    """How one token is shown.

    Attributes:
      classes: of the style sheet: the expert, and its colour and texture unless `color` is set.
      color: a CSS colour, for an entropy.
      label: the number of the expert, or bits.
      title: the router's choices in words.
    """

    classes: str
    color: str
    label: str
    title: str


def expert_classes(expert: int) -> str:
    """Returns the classes of an expert: its number, its colour and its texture."""
    texture = expert // COLORS % TEXTURES
    return f"expert-{expert} color-{expert % COLORS} texture-{texture}"


def marks(routing: Routing, layer: int, choice: int) -> list[Mark]:
    """Returns the mark of each token.

    Args:
      layer: position in `routing.layers`.
      choice: 0 for the most probable expert, up to `top_k` - 1, or `ENTROPY`.
    """
    experts, probs = routing.experts[layer].tolist(), routing.probs[layer].tolist()
    most = math.log2(routing.num_experts)
    found = []
    for token, entropy in enumerate(routing.entropy[layer].tolist()):
        chosen = experts[token]
        title = _title(chosen, probs[token], entropy)
        if choice == ENTROPY:
            color = ramp(entropy / most if most else 0.0)
            found.append(Mark(f"expert-{chosen[0]}", color, f"{entropy:.1f}", title))
        else:
            found.append(Mark(expert_classes(chosen[choice]), "", str(chosen[choice]), title))
    return found


def _title(chosen: Sequence[int], probs: Sequence[float], entropy: float) -> str:
    choices = ", ".join(f"expert {expert} ({percent(probs[expert])})" for expert in chosen)
    return f"{choices}; entropy {entropy:.2f} bits"


def ramp(share: float) -> str:
    """Returns the colour of a share of 1, dark blue to yellow."""
    position = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    start = min(int(position), len(_RAMP) - 2)
    weight = position - start
    mixed = (
        round(a + (b - a) * weight) for a, b in zip(_RAMP[start], _RAMP[start + 1], strict=True)
    )
    return f"rgb({' '.join(map(str, mixed))})"
