"""Tables of the experts' loads and of the routers' entropies, for patches and for words."""

import math

import numpy as np

from moddistill.explorer.marks import expert_classes
from moddistill.explorer.markup import percent
from moddistill.explorer.routing import Routing

KINDS = ("patches", "words")


def tokens_of_kinds(routing: Routing) -> dict[str, np.ndarray]:
    """Returns masks [T] of the patches and of the words, without a kind that does not occur."""
    masks = zip(KINDS, (routing.is_image, ~routing.is_image), strict=True)
    return {kind: tokens for kind, tokens in masks if tokens.any()}


def entropy_sentence(routing: Routing, layer: int) -> str:
    """Returns the mean entropy of a layer's router for each kind of tokens."""
    parts = [
        f"{kind} {np.mean(routing.entropy[layer, tokens]):.2f} bits"
        for kind, tokens in tokens_of_kinds(routing).items()
    ]
    even = math.log2(routing.num_experts)
    return f"Mean router entropy: {', '.join(parts)} (0 is certain, {even:.2f} even)."


def load_table(routing: Routing, layer: int) -> str:
    """Returns each expert's share of the assignments of a layer, as bars with numbers."""
    kinds = tokens_of_kinds(routing)
    loads = {kind: routing.load(layer, tokens) for kind, tokens in kinds.items()}
    rows = []
    for expert in range(routing.num_experts):
        classes = expert_classes(expert)
        cells = "".join(_bar(float(load[expert]), classes) for load in loads.values())
        rows.append(
            f'<tr tabindex="0" class="load-{expert}"><th scope="row">'
            f'<span class="key {classes}"></span> expert {expert}</th>{cells}</tr>'
        )
    return _table("loads", ["Load", *kinds], rows)


def _bar(share: float, classes: str) -> str:
    bar = f'<span class="bar {classes}" style="width:{share:.2%}"></span>'
    return f'<td>{percent(share)}<span class="track">{bar}</span></td>'


def layer_table(routing: Routing, layer: int) -> str:
    """Returns loads and mean entropies of all expert layers; `layer` is the current one."""
    kinds = tokens_of_kinds(routing)
    rows = []
    for number, index in enumerate(routing.layers):
        current = ' class="current" aria-current="true"' if number == layer else ""
        cells = "".join(_stack(routing, number, tokens) for tokens in kinds.values())
        rows.append(f'<tr{current}><th scope="row">layer {index}</th>{cells}</tr>')
    return _table("layers", ["All layers", *kinds], rows)


def _stack(routing: Routing, layer: int, tokens: np.ndarray) -> str:
    load = routing.load(layer, tokens).tolist()
    words = ", ".join(f"expert {expert} {percent(share)}" for expert, share in enumerate(load))
    parts = "".join(
        f'<span class="{expert_classes(expert)}" style="width:{share:.2%}"></span>'
        for expert, share in enumerate(load)
    )
    stack = f'<span class="stack" role="img" aria-label="{words}" title="{words}">{parts}</span>'
    return f"<td>{np.mean(routing.entropy[layer, tokens]):.2f} bits{stack}</td>"


def _table(name: str, head: list[str], rows: list[str]) -> str:
    titles = "".join(f'<th scope="col">{title}</th>' for title in head)
    return (
        f'<div class="scroll"><table class="{name}"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
