"""LLaVA and preference records from easy-VQA's published questions and answers.

Image names are relative to the folder `images`. What holds for a train image holds for its
variants, since flips and shifts change neither colour nor shape.
"""

import random
from collections.abc import Iterable, Sequence

from moddistill.errors import UserError
from tools.easy_vqa.images import image_name
from tools.easy_vqa.published import COLORS, SHAPES, YES_NO, Question, caption

CAPTION_PROMPT = "Describe the image."
# False "yes" is what the preference stage is to lower; the rest keeps "no" from becoming a habit.
PAIR_SHARES = {"no": 1 / 2, "yes": 1 / 6, "other": 1 / 6, "caption": 1 / 6}


def conversation(turns: Iterable[tuple[str, str]], prefix: str = "") -> list[dict]:
    """LLaVA turns of (question, answer) pairs; `prefix` stands before the first question."""
    turns = [
        {"from": role, "value": value}
        for pair in turns
        for role, value in zip(("human", "gpt"), pair, strict=True)
    ]
    turns[0]["value"] = prefix + turns[0]["value"]
    return turns


def image_record(name: str, image: str, turns: Iterable[tuple[str, str]]) -> dict:
    """A LLaVA record of one image, which stands before the first question."""
    return {"id": name, "image": image, "conversations": conversation(turns, "<image>\n")}


def caption_records(known: dict[int, tuple[str, str]], variants: int) -> list[dict]:
    """One record for each image and variant with a known caption."""
    return [
        image_record(f"caption-{i}-{v}", image_name(i, v), [(CAPTION_PROMPT, caption(*pair))])
        for i, pair in known.items()
        for v in range(variants)
    ]


def question_records(
    groups: dict[int, list[Question]], variants: int, questions_per_record: int
) -> list[dict]:
    """The questions of each image, cut into records that take its variants in turn.

    With several questions a record, earlier turns give away the answers of later ones.
    """
    records = []
    for image, questions in groups.items():
        for n, start in enumerate(range(0, len(questions), questions_per_record)):
            turns = [(q.text, q.answer) for q in questions[start : start + questions_per_record]]
            name = image_name(image, n % variants)
            records.append(image_record(f"train-{image}-{n}", name, turns))
    return records


def test_records(questions: Sequence[Question]) -> list[dict]:
    """The test questions, one a record."""
    return [
        image_record(f"test-{i}", f"test/{q.image}.png", [(q.text, q.answer)])
        for i, q in enumerate(questions)
    ]


def another(value: str, rng: random.Random) -> str:
    """A different value of the same kind: yes or no, a colour, or a shape."""
    kind = next(kind for kind in (YES_NO, COLORS, SHAPES) if value in kind)
    return rng.choice([other for other in kind if other != value])


def preference_pools(
    groups: dict[int, list[Question]], known: dict[int, tuple[str, str]], rng: random.Random
) -> dict[str, list[tuple[int, str, str, str]]]:
    """Every (image, prompt, chosen, rejected) that the rules make, by the kinds of PAIR_SHARES."""
    pools = {kind: [] for kind in PAIR_SHARES}
    for image, questions in groups.items():
        for q in questions:
            kind = q.answer if q.answer in YES_NO else "other"
            pools[kind].append((image, q.text, q.answer, another(q.answer, rng)))
        if image in known:
            color, shape = known[image]
            wrong = rng.choice([(another(color, rng), shape), (color, another(shape, rng))])
            pair = (image, CAPTION_PROMPT, caption(color, shape), caption(*wrong))
            pools["caption"].append(pair)
    return pools


def preference_records(
    pools: dict[str, list[tuple[int, str, str, str]]], pairs: int, variants: int, rng: random.Random
) -> list[dict]:
    """About `pairs` preference records drawn without repetition in PAIR_SHARES, shuffled."""
    drawn = []
    for kind, share in PAIR_SHARES.items():
        wanted = round(pairs * share)
        if wanted > len(pools[kind]):
            raise UserError(
                f"{pairs} preference pairs need {wanted} of kind {kind!r}, but the questions give"
                f" {len(pools[kind])}: lower --preference_pairs"
            )
        drawn += rng.sample(pools[kind], wanted)
    rng.shuffle(drawn)
    return [
        {
            "id": f"preference-{n}",
            "image": image_name(image, rng.randrange(variants)),
            "conversations": [{"from": "human", "value": f"<image>\n{prompt}"}],
            "chosen": chosen,
            "rejected": rejected,
        }
        for n, (image, prompt, chosen, rejected) in enumerate(drawn)
    ]


def text_records(
    groups: dict[int, list[Question]], known: dict[int, tuple[str, str]]
) -> list[dict]:
    """Records without an image: a caption, then a question that it answers or, twice, "describe".

    A language model learns the demo's words and answers from them, before it sees any picture.
    """
    pairs = []
    for image, color_shape in known.items():
        text = caption(*color_shape)
        pairs += [(f"{text}. {q.text}", q.answer) for q in groups[image]]
        pairs += [(f"{text}. {CAPTION_PROMPT}", text)] * 2
    return [
        {"id": f"text-{n}", "conversations": conversation([pair])} for n, pair in enumerate(pairs)
    ]


def texts(records: Iterable[dict]) -> list[str]:
    """Every prompt and answer of `records`, without image placeholders."""
    found = []
    for record in records:
        found += [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        found += [record[key] for key in ("chosen", "rejected") if key in record]
    return found
