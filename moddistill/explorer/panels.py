"""The experts of models on images and words, side by side, as HTML."""

import dataclasses
from collections.abc import Sequence

from PIL import Image

from moddistill.data.tokenizer import Tokenizer
from moddistill.explorer.loads import entropy_sentence, layer_table, load_table, tokens_of_kinds
from moddistill.explorer.marks import ENTROPY, Mark, marks, ramp
from moddistill.explorer.markup import html_text, percent, token_texts, visible
from moddistill.explorer.overlay import overlay
from moddistill.explorer.routing import Routing, same_experts

_SCALE_STEPS = 5


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Panel:
    """What one model did with the images and words of a conversation.

    Attributes:
      title: of the model.
      images: in their order in the row.
      prompt_length: tokens before the last answer.
    """

    title: str
    tokenizer: Tokenizer
    images: tuple[Image.Image, ...]
    routing: Routing
    prompt_length: int


def experts_view(panels: Sequence[Panel], layer: int, choice: int) -> str:
    """Returns the panels side by side, each compared with the first.

    Args:
      layer: number among the expert layers; a model with fewer shows its last.
      choice: 0 for the most probable expert, or `ENTROPY`; a model with fewer shows its last.
    """
    shown = "".join(_panel(panel, panels[0], layer, choice) for panel in panels)
    most = max(panel.routing.num_experts for panel in panels)
    return f'<style>{_highlights(most)}</style><div class="panels">{shown}</div>'


def _highlights(num_experts: int) -> str:
    """Rules that dim all other experts while the load of one is pointed at or has the focus."""
    return "".join(
        f".panels:has(.load-{expert}:is(:hover,:focus)) .mark:not(.expert-{expert}){{opacity:.15}}"
        for expert in range(num_experts)
    )


def _panel(panel: Panel, first: Panel, layer: int, choice: int) -> str:
    routing = panel.routing
    layer = min(layer, len(routing.layers) - 1)
    choice = min(choice, routing.top_k - 1)
    found = marks(routing, layer, choice)
    sentence, changed = "", [False] * len(found)
    if panel is not first and choice != ENTROPY:
        sentence, changed = _compare(panel, first, layer, choice)
    return (
        f'<section class="panel"><h3>{html_text(panel.title)}</h3>'
        f"<p>Layer {routing.layers[layer]} of the decoder. {entropy_sentence(routing, layer)}</p>"
        f"{_images(panel, found, changed)}{_scale(routing) if choice == ENTROPY else ''}"
        f"{f'<p>{html_text(sentence)}</p>' if sentence else ''}"
        f"{_words(panel, found, changed)}{load_table(routing, layer)}"
        f"{layer_table(routing, layer)}{_numbers(panel, found)}</section>"
    )


def _compare(panel: Panel, first: Panel, layer: int, choice: int) -> tuple[str, list[bool]]:
    """Returns a sentence, and the tokens of the prompt whose expert is not that of `first`."""
    a, b, length = panel.routing, first.routing, panel.prompt_length
    changed = [False] * len(a.token_ids)
    if (a.layers, a.top_k, a.num_experts) != (b.layers, b.top_k, b.num_experts):
        return "Not compared: the models have other expert layers or numbers of experts.", changed
    if a.token_ids[:length] != b.token_ids[: first.prompt_length]:
        return "Not compared: the prompts have other tokens, such as earlier answers.", changed
    same = same_experts(a, b, layer, choice, length)
    changed[:length] = (~same).tolist()
    parts = [
        f"{percent(float(same[tokens[:length]].mean()))} of the {kind}"
        for kind, tokens in tokens_of_kinds(a).items()
    ]
    shares = " and ".join(parts)
    return f"Same expert as in {first.title}: {shares} of the prompt; others are framed.", changed


def _images(panel: Panel, found: Sequence[Mark], changed: Sequence[bool]) -> str:
    """The overlays of all images, each of an equal share of the patches."""
    patches = panel.routing.is_image.nonzero()[0].tolist()
    overlays = []
    for number, image in enumerate(panel.images):
        part = _patches_of(patches, number, len(panel.images))
        alt = f"Image {number + 1} with the expert of each patch; numbers are in the table below"
        overlays.append(overlay(image, [found[i] for i in part], [changed[i] for i in part], alt))
    return f'<div class="overlays">{"".join(overlays)}</div>'


def _patches_of(patches: Sequence[int], number: int, images: int) -> Sequence[int]:
    count = len(patches) // images
    return patches[number * count : (number + 1) * count]


def _scale(routing: Routing) -> str:
    steps = range(_SCALE_STEPS + 1)
    colors = ", ".join(ramp(step / _SCALE_STEPS) for step in steps)
    return (
        '<p class="scale">certain <span style="background:linear-gradient(90deg, '
        f'{colors})"></span> even over {routing.num_experts} experts</p>'
    )


def _words(panel: Panel, found: Sequence[Mark], changed: Sequence[bool]) -> str:
    """The tokens of the last prompt and answer; patches are one sign for each image."""
    routing = panel.routing
    texts = token_texts(routing.token_ids, panel.tokenizer)
    per_image = int(routing.is_image.sum()) // max(len(panel.images), 1)
    parts: dict[str, list[str]] = {"Prompt": [], "Answer": []}
    patches = 0
    for token, (text, mark) in enumerate(zip(texts, found, strict=True)):
        part = parts["Prompt" if token < panel.prompt_length else "Answer"]
        if not routing.is_image[token]:
            part.append(_word(text, mark, changed[token]))
            continue
        if patches % per_image == 0:
            part.append(f'<span class="placeholder">image {patches // per_image + 1}</span>')
        patches += 1
    return "".join(
        f'<h4>{title}</h4><p class="words">{"".join(spans)}</p>' for title, spans in parts.items()
    )


def _word(text: str, mark: Mark, changed: bool) -> str:
    style = f' style="background:{mark.color};color:{_ink(mark)}"' if mark.color else ""
    classes = f"mark word {mark.classes}" + " changed" * changed
    shown, title = html_text(visible(text)), html_text(mark.title)
    return (
        f'<span class="{classes}"{style} title="{shown}: {title}">'
        f"{shown}<sub>{mark.label}</sub></span>"
    )


def _ink(mark: Mark) -> str:
    """Black or white, whichever is seen better on an entropy's colour."""
    red, green, blue = map(int, mark.color.removeprefix("rgb(").removesuffix(")").split())
    return "#000" if 0.3 * red + 0.6 * green + 0.1 * blue > 110 else "#fff"


def _numbers(panel: Panel, found: Sequence[Mark]) -> str:
    """The overlays as tables of numbers."""
    patches = panel.routing.is_image.nonzero()[0].tolist()
    tables = []
    for number in range(len(panel.images)):
        part = [found[i].label for i in _patches_of(patches, number, len(panel.images))]
        grid = round(len(part) ** 0.5)
        rows = "".join(
            f"<tr>{''.join(f'<td>{label}</td>' for label in part[start : start + grid])}</tr>"
            for start in range(0, len(part), grid)
        )
        tables.append(f"<table><caption>image {number + 1}</caption>{rows}</table>")
    summary = "<summary>Patches as numbers</summary>"
    body = f'<div class="scroll">{"".join(tables)}</div>'
    return f"<details>{summary}{body}</details>" if tables else ""
