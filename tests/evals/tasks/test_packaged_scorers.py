"""Counts and scores against those of lmms-eval, on 2,000 random answers each.

Words are drawn, so NLTK and spaCy are not needed; `benchmarks/task_scorers.py` has sentences, the
real words and more packages.
"""

import random

import pytest

from moddistill.evals.tasks.amber import utils as amber
from moddistill.evals.tasks.object_halbench import utils as halbench
from tests.evals.tasks.installed import lmms_eval, load_file

ANSWERS = 2000
UNUSED = ("nltk", "nltk.corpus", "nltk.stem", "spacy")


def packaged(task):
    return load_file(lmms_eval() / f"tasks/{task}/utils.py", UNUSED)


def test_amber_descriptions_are_scored_as_by_amber_g(monkeypatch):
    scorer = packaged("amber_g")
    draw = random.Random(0)
    words = [f"w{number}" for number in range(40)]
    association = {word: draw.sample(words, draw.randint(0, 3)) for word in words[:30]}
    near = {tuple(draw.sample(words, 2)) for _ in range(60)}
    lists = amber.WordLists(
        association, frozenset(words[:3]), frozenset(association).union(*association.values())
    )

    def similar(one, other):
        return one == other or (one, other) in near

    monkeypatch.setattr(scorer, "extract_nouns", str.split)
    monkeypatch.setattr(scorer, "check_synonyms_word", lambda one, other, _: similar(one, other))
    counts = {
        "chair_score": "hallucinated", "chair_num": "objects",
        "safe_cover_score": "covered", "safe_cover_num": "truth",
        "hallu_cover_score": "imagined", "hallu_cover_num": "hallu",
    }  # fmt: skip
    zero = dict.fromkeys((*counts, "non_hallu_score", "non_hallu_num"), 0)
    rows, results = [], []
    for _ in range(ANSWERS):
        truth = draw.sample(words[:30], draw.randint(1, 6))
        hallu = draw.sample(words[:30], draw.randint(1, 4))
        nouns = draw.choices([*words, "other"], k=draw.randint(0, 12))
        metrics = dict(zero)
        doc = {"truth": truth, "hallu": hallu}
        answer = {"question_id": 0, "text": " ".join(nouns)}
        scorer.process_generative_task(
            answer, doc, association, lists.objects, lists.safe, 0.8, metrics
        )
        row = amber.describe(nouns, truth, hallu, lists, similar)
        assert {key: row[key] for key in counts.values()} == {
            key: metrics[name] for name, key in counts.items()
        }
        rows.append(row)
        results.append(metrics)
    for name in ("chair", "cover", "hal", "cog"):
        other = getattr(scorer, f"amber_g_aggregate_{name}")(results)
        assert getattr(amber, name)(rows) == pytest.approx(other, rel=1e-12)


def test_amber_questions_are_scored_as_by_amber_g():
    scorer = packaged("amber_g")
    draw = random.Random(0)
    kinds = dict(zip(amber.DIMENSIONS, ("ha", "as", "an", "aa"), strict=False))
    parts = ("correct_score", "correct_num", "no_score", "no_num", "ans_no_score", "ans_no_num")
    prefixes = ("", "ha_", "as_", "an_", "aa_", "asso_")
    metrics = dict.fromkeys((f"{kind}qa_{part}" for kind in prefixes for part in parts), 0)
    rows = []
    for _ in range(ANSWERS):
        kind, truth = draw.choice(list(amber.DIMENSIONS)), draw.choice(("yes", "no"))
        answer = draw.choice(("Yes", "no.", "No, it isn't.", "Yes, there is a tree.", "A tree."))
        doc = {"type": kind, "truth": truth}
        scorer.process_discriminative_task({"question_id": 0, "text": answer}, doc, metrics)
        rows.append({"kind": kind, "truth": truth, "answer": amber.yes_or_no(answer)})
    groups = {"": rows}
    for kind, key in kinds.items():
        groups[f"{key}_"] = [row for row in rows if row["kind"] == kind]
    for key, group in groups.items():
        for measure, part in (
            (amber.accuracy, "correct"),
            (amber.precision, "ans_no"),
            (amber.recall, "no"),
        ):
            share = metrics[f"{key}qa_{part}_score"] / metrics[f"{key}qa_{part}_num"]
            assert measure(group) == pytest.approx(100 * share, rel=1e-12)


def test_mentions_and_rates_are_those_of_coco_cap_chair(monkeypatch):
    scorer = packaged("coco_cap_chair")
    monkeypatch.setattr(scorer.nltk, "word_tokenize", str.split)
    monkeypatch.setattr(scorer.nltk, "pos_tag", lambda words: [(word, "NN") for word in words])
    monkeypatch.setattr(scorer.WordNetLemmatizer(), "lemmatize", lambda word, pos: word)
    vocabulary = halbench.Vocabulary(
        {word: scorer.INVERSE_SYNONYM_DICT[word] for word in scorer.MSCOCO_OBJECTS},
        scorer.DOUBLE_WORD_DICT,
    )
    draw = random.Random(0)
    words = sorted({part.lower() for word in vocabulary.classes for part in word.split()})
    words += ["baby", "adult", "passenger", "home", "plate", "track", "toilet", "seat"] * 10
    classes = sorted(set(vocabulary.classes.values()))
    rows, results = [], []
    for _ in range(ANSWERS):
        caption = draw.choices(words, k=draw.randint(0, 20))
        if draw.random() < 0.5:
            caption += draw.choice(list(vocabulary.pairs)).split()
        objects = draw.sample(classes, draw.randint(1, 40))
        _, theirs, _, _ = scorer.caption_to_words(" ".join(caption))
        mentioned = halbench.mentions(caption, vocabulary)
        assert mentioned == theirs
        rows.append(halbench.count("", mentioned, objects))
        results.append({"answer": objects, "pred": theirs})
    for measure, name in (
        (halbench.mention_rate, "chair_i"),
        (halbench.all_responses_rate, "chair_s"),
        (halbench.recall, "recall"),
    ):
        other = getattr(scorer, f"coco_cap_chair_aggregate_results_{name}")(results)
        assert measure(rows) == pytest.approx(other, rel=1e-12)
