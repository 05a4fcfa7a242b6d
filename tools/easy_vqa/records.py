"""LLaVA and preference records from easy-VQA's published questions and answers.

Image names are relative to the folder `images`. Records of a train image are valid for its
variants, since flips and shifts change neither colour nor shape.
"""

import random
from collections.abc import Iterable, Sequence

from moddistill.errors import invalid
from tools.easy_vqa.images import image_name
from tools.easy_vqa.published import COLORS, SHAPES, YES_NO, Question, caption

CAPTION_PROMPT = "Describe the image."
# The preference stage should lower false "yes"; the other kinds prevent a bias towards "no".
PAIR_SHARES = {"no": 1 / 2, "yes": 1 / 6, "other": 1 / 6, "caption": 1 / 6}


def conversation(turns: Iterable[tuple[str, str]], prefix: str = "") -> list[dict]:
    """Returns LLaVA turns of (question, answer) pairs; `prefix` precedes the first question."""
    turns = [
        {"from": role, "value": value}
        for pair in turns
        for role, value in zip(("human", "gpt"), pair, strict=True)
    ]
    turns[0]["value"] = prefix + turns[0]["value"]
    return turns


def image_record(name: str, image: str, turns: Iterable[tuple[str, str]]) -> dict:
    """Returns a LLaVA record of one image, which precedes the first question."""
    return {"id": name, "image": image, "conversations": conversation(turns, "<image>\n")}


def caption_records(known: dict[int, tuple[str, str]], variants: int) -> list[dict]:
    """Returns one record for each image and variant with a known caption."""
    return [
        image_record(f"caption-{i}-{v}", image_name(i, v), [(CAPTION_PROMPT, caption(*pair))])
        for i, pair in known.items()
        for v in range(variants)
    ]


def question_records(
    groups: dict[int, list[Question]], variants: int, questions_per_record: int
) -> list[dict]:
    """Splits the questions of each image into records, which alternate between its variants.

    With several questions per record, earlier turns can reveal the answers of later ones.
    """
    records = []
    for image, questions in groups.items():
        for n, start in enumerate(range(0, len(questions), questions_per_record)):
            turns = [(q.text, q.answer) for q in questions[start : start + questions_per_record]]
            name = image_name(image, n % variants)
            records.append(image_record(f"train-{image}-{n}", name, turns))
    return records


def test_records(questions: Sequence[Question]) -> list[dict]:
    """Returns the test questions, one per record."""
    return [
        image_record(f"test-{i}", f"test/{q.image}.png", [(q.text, q.answer)])
        for i, q in enumerate(questions)
    ]


def another(value: str, rng: random.Random) -> str:
    """Draws a different value of the same kind: yes or no, a colour, or a shape."""
    kind = next(kind for kind in (YES_NO, COLORS, SHAPES) if value in kind)
    return rng.choice([other for other in kind if other != value])


def preference_pools(
    groups: dict[int, list[Question]], known: dict[int, tuple[str, str]], rng: random.Random
) -> dict[str, list[tuple[int, str, str, str]]]:
    """Returns all (image, prompt, chosen, rejected) of the rules, by the kinds of PAIR_SHARES."""
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
    """Samples about `pairs` preference records without repetition, in PAIR_SHARES, shuffled."""
    samples = []
    for kind, share in PAIR_SHARES.items():
        count = round(pairs * share)
        if count > len(pools[kind]):
            expected = f"fewer, as the questions give {len(pools[kind])} pairs of kind {kind!r}"
            raise invalid("--preference_pairs", pairs, f"{expected} and {count} are needed")
        samples += rng.sample(pools[kind], count)
    rng.shuffle(samples)
    return [
        {
            "id": f"preference-{n}",
            "image": image_name(image, rng.randrange(variants)),
            "conversations": [{"from": "human", "value": f"<image>\n{prompt}"}],
            "chosen": chosen,
            "rejected": rejected,
        }
        for n, (image, prompt, chosen, rejected) in enumerate(samples)
    ]


def text_records(
    groups: dict[int, list[Question]], known: dict[int, tuple[str, str]]
) -> list[dict]:
    """Returns records without images: a caption, then a question that it answers.

    A language model learns the words and answers of the demo from them. The prompt of captions
    follows twice per caption.
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
    """Returns all prompts and answers of `records`, without image placeholders."""
    texts = []
    for record in records:
        texts += [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        texts += [record[key] for key in ("chosen", "rejected") if key in record]
    return texts
