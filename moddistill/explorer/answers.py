"""A conversation as HTML: answers with the probability of each token."""

import math
from collections.abc import Sequence

from moddistill.data.records import IMAGE
from moddistill.data.tokenizer import Tokenizer
from moddistill.explorer.conversation import Conversation, Turn
from moddistill.explorer.data_uris import data_uri
from moddistill.explorer.markup import html_text, percent, token_texts, visible
from moddistill.explorer.models import ExploredModel
from moddistill.inference.answer import Answer, TokenLogprobs

_ENDINGS = {
    "end": "ended by the model",
    "stop": "ended by a stop text",
    "length": "cut at the longest answer",
}
_THUMBNAIL = 160  # pixels
_UNBROKEN_SPACE = "\u00a0"


def transcript(conversation: Conversation, models: Sequence[ExploredModel]) -> str:
    """Returns all turns, the answers of the models side by side."""
    return "".join(_turn(turn, models) for turn in conversation)


def _turn(turn: Turn, models: Sequence[ExploredModel]) -> str:
    images = "".join(
        f'<img src="{data_uri(image, _THUMBNAIL)}" alt="image of the question">'
        for image in turn.images
    )
    asked = turn.question.replace(IMAGE, "").strip()
    answers = "".join(
        _answer(turn.answers[number] if number < len(turn.answers) else "", model)
        for number, model in enumerate(models)
    )
    question = f'<div class="question">{images}<p>{html_text(asked)}</p></div>'
    return f'<article class="turn">{question}<div class="answers">{answers}</div></article>'


def _answer(answer: str | Answer, model: ExploredModel) -> str:
    title = f"<h3>{html_text(model.title)}</h3>"
    if not isinstance(answer, Answer):
        text = f'{html_text(answer)}<span class="writing" role="img" aria-label="writing"></span>'
        return f'<section class="answer" aria-busy="true">{title}<p>{text}</p></section>'
    texts = token_texts([token.token_id for token in answer.logprobs], model.tokenizer)
    rows = [
        (f"{visible(text)} {_percent_of(token.logprob)}", _others(token, model.tokenizer))
        for text, token in zip(texts, answer.logprobs, strict=True)
    ]
    spans = []
    for number, (text, token, row) in enumerate(zip(texts, answer.logprobs, rows, strict=True)):
        is_end = number == len(answer.token_ids)
        shown = "■" if is_end else html_text(text.lstrip() if number == 0 else text)
        hover = "&#10;or ".join(map(html_text, row))
        spans.append(
            f'<span class="token{" end" * is_end}" style="--p:{math.exp(token.logprob):.3f}" '
            f'title="{hover}">{shown}</span>'
        )
    count = len(answer.token_ids)
    note = f"{count} token{'s' * (count != 1)}, {_ENDINGS[answer.ended]}"
    return (
        f'<section class="answer">{title}<p>{"".join(spans)}</p>'
        f"<details><summary>Token probabilities: {note}</summary>{_table(rows)}</details></section>"
    )


def _others(token: TokenLogprobs, tokenizer: Tokenizer) -> str:
    """The most probable other tokens, with their probabilities."""
    found = []
    for token_id, logprob in token.top:
        if token_id != token.token_id:
            [text] = token_texts([token_id], tokenizer)
            found.append(f"{visible(text)} {_percent_of(logprob)}")
    return ", ".join(found)


def _percent_of(logprob: float) -> str:
    return percent(math.exp(logprob)).replace(" ", _UNBROKEN_SPACE)


def _table(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(
        f"<tr>{''.join(f'<td>{html_text(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    head = "<tr><th>token</th><th>other likely tokens</th></tr>"
    return f'<div class="scroll"><table class="probabilities">{head}{body}</table></div>'
