"""The page: components and events of Gradio, and nothing else."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from moddistill.errors import UserError
from moddistill.explorer.answers import transcript
from moddistill.explorer.conversation import Conversation, ask, routing_of
from moddistill.explorer.marks import ENTROPY
from moddistill.explorer.markup import html_text
from moddistill.explorer.models import ExploredModel
from moddistill.explorer.panels import Panel, experts_view
from moddistill.inference.answer import Decoding

_ORDINALS = ("Most probable expert", "Second expert", "Third expert")
_UPLOADS_DELETED = (600, 3600)  # seconds: how often, and how old
_EMPTY = '<p class="hint">After an answer, the experts of its patches and words are shown here.</p>'


def build_page(
    models: Sequence[ExploredModel], decoding: Decoding, images: Sequence[str] = ()
) -> gr.Blocks:
    """Returns the page, on which all models answer each question.

    Args:
      images: files of the first question.
    """
    with gr.Blocks(
        title="moddistill explore", analytics_enabled=False, delete_cache=_UPLOADS_DELETED
    ) as page:
        conversation, panels = gr.State(()), gr.State(())
        gr.HTML("<h1>moddistill explore</h1>")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                shown = gr.HTML(elem_id="conversation")
                notice = gr.HTML(elem_id="notice")
                box = _question_box(images)
                again = gr.Button("New conversation", size="sm")
            with gr.Column(scale=3, min_width=300):
                layer, choice, view = _expert_controls(models)

        def answer(
            asked: dict[str, Any], before: Conversation
        ) -> Iterator[tuple[Any, str, Any, Any]]:
            after = before
            try:
                for after in ask(models, before, asked["text"], asked["files"], decoding):
                    yield None, "", transcript(after, models), gr.skip()
            except UserError as error:
                yield gr.skip(), _alert(error), transcript(before, models), gr.skip()
            else:
                yield gr.skip(), "", gr.skip(), after

        answering = gr.on(
            [box.submit],
            answer,
            inputs=[box, conversation],
            outputs=[box, notice, shown, conversation],
        )

        def route(after: Conversation, chosen_layer: int, chosen: int) -> tuple[Any, str]:
            found = _panels(models, after)
            return found, view_of(found, chosen_layer, chosen)

        def view_of(found: Sequence[Panel], chosen_layer: int, chosen: int) -> str:
            return experts_view(found, chosen_layer - 1, chosen) if found else _EMPTY

        if view is not None:
            conversation.change(
                route, [conversation, layer, choice], [panels, view], show_progress="hidden"
            )
            for control in (layer, choice):
                control.change(
                    view_of,
                    [panels, layer, choice],
                    view,
                    show_progress="hidden",
                    trigger_mode="always_last",
                )
        # In this order, as a part of the old answer would bring its turns back.
        again.click(None, cancels=[answering]).then(
            lambda: (None, "", "", ()), outputs=[box, notice, shown, conversation]
        )
    return page


def _question_box(images: Sequence[str]) -> Any:
    """Adds the field of a question and its images."""
    return gr.MultimodalTextbox(
        {"text": "", "files": list(images)},
        label="Question and images",
        placeholder="Ask about an image",
        file_types=["image"],
        file_count="multiple",
        elem_id="question",
        max_plain_text_length=100_000,
    )


def _expert_controls(models: Sequence[ExploredModel]) -> tuple[Any, Any, Any]:
    """Adds the controls of the experts and their view; without a sparse model, the reason."""
    gr.HTML("<h2>Experts</h2>")
    sparse = [model.model.config.decoder for model in models if model.is_sparse]
    for model in models:
        if not model.is_sparse:
            gr.HTML(
                f'<p class="hint">None to show for “{html_text(model.title)}”: the model is '
                "dense, so that every token passes the same feed-forward layers.</p>"
            )
    if not sparse:
        return None, None, None
    count = max(len(config.moe_layers) for config in sparse)
    layer = gr.Slider(1, count, 1, step=1, label=f"Expert layer, of {count}", visible=count > 1)
    top_k = max(config.moe.top_k for config in sparse)
    choices = [(_ordinal(number), number) for number in range(top_k)]
    choice = gr.Radio([*choices, ("Router entropy", ENTROPY)], value=0, label="Colours show")
    return layer, choice, gr.HTML(_EMPTY, elem_id="experts")


def _ordinal(number: int) -> str:
    return _ORDINALS[number] if number < len(_ORDINALS) else f"Expert {number + 1} by probability"


def _panels(models: Sequence[ExploredModel], conversation: Conversation) -> tuple[Panel, ...]:
    if not conversation:
        return ()
    images = tuple(image for turn in conversation for image in turn.images)
    panels = []
    for number, model in enumerate(models):
        routing = routing_of(model, conversation, number)
        if routing is not None:
            panels.append(
                Panel(
                    title=model.title,
                    tokenizer=model.tokenizer,
                    images=images,
                    routing=routing,
                    prompt_length=len(conversation[-1].answers[number].prompt_ids),
                )
            )
    return tuple(panels)


def _alert(error: UserError) -> str:
    return f'<p role="alert">{html_text(str(error))}</p>'


def style_file() -> Path:
    """Returns the style sheet."""
    return Path(__file__).with_name("style.css")
