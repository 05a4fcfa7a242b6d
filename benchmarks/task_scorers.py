"""The scorers of the library's tasks for lmms-eval against packaged ones, on generated answers.

    python -m benchmarks.task_scorers --amber AMBER --synonyms FILE --vectors en_core_web_lg

`AMBER` is a clone of the publisher's repository (images are not needed), `FILE` the publisher's
synonyms_refine.txt of Object HalBench. Needs spaCy with a model that has vectors, NLTK with its
data, and the packages (`pip install --no-deps lmms-eval==0.7.3 ms-vlmeval==0.0.20 sty`, pandas).

Answers are sentences of objects in and not in the image. Each side scores each answer.
Where the rules differ on purpose, the differences are printed.
"""

import argparse
import collections
import functools
import importlib.util
import json
import math
import random
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moddistill.evals.tasks._task_utils import nouns as words
from moddistill.evals.tasks.amber import utils as amber
from moddistill.evals.tasks.object_halbench import utils as halbench

_COUNTS = {  # names of lmms-eval and of this library
    "chair_score": "hallucinated",
    "chair_num": "objects",
    "safe_cover_score": "covered",
    "safe_cover_num": "truth",
    "hallu_cover_score": "imagined",
    "hallu_cover_num": "hallu",
}
_SENTENCES = (
    "The image shows a {0} and two {1}s near a {2}.",
    "A {0} is seated on the {1}, while a {2} is parked behind it.",
    "There are several {0}s in the background; one of them holds a {1}.",
    "In the foreground, the {0} rides past a {1} and a {2}.",
    "A baby {0} sleeps next to the {1} with a {2} on it.",
)
_CLEAR = ("Yes", "No", "yes.", "no.", "Yes, the {0} is there.", "No, there is no {0} here.")
_RATES = ("accuracy", "precision", "recall", "f1")
_MIXED = (
    "There is snow on the {0}.",
    "I know the {0} well.",
    "It is not a {0}.",
    "Yes, but no {0}.",
    "No. Yes, maybe.",
)


def sentences(objects: Sequence[str], others: Sequence[str], draw: random.Random) -> str:
    """Returns one to four sentences, four of five words from the first list."""
    made = []
    for _ in range(draw.randint(1, 4)):
        chosen = [
            draw.choice(objects if draw.random() < 0.8 and objects else others) for _ in range(3)
        ]
        made.append(draw.choice(_SENTENCES).format(*chosen))
    return " ".join(made)


def generative(folder: Path, vectors: str, count: int, draw: random.Random) -> bool:
    """Compares AMBER's descriptions with lmms-eval's `amber_g`."""
    packaged = _lmms_eval("amber_g")
    lists = amber.read_word_lists(folder)
    similar = words.Vectors(vectors, amber._THRESHOLD).similar
    language = packaged.spacy.load(vectors)
    packaged._NLP = functools.cache(language.make_doc)  # the same vectors, without a parser
    documents = _annotations(folder, lambda kind: kind == "generative")
    zero = packaged.load_metrics(folder / "data/metrics.txt")
    everything = sorted(lists.objects)
    rows, theirs, equal = [], [], 0
    for number in range(count):
        doc = documents[number % len(documents)]
        answer = sentences(doc["truth"] + doc["hallu"], everything, draw)
        row = amber.describe(words.nouns(answer), doc["truth"], doc["hallu"], lists, similar)
        metrics = dict(zero)
        item = {"question_id": doc["id"], "text": answer}
        packaged.process_generative_task(
            item, doc, lists.association, lists.objects, lists.safe, amber._THRESHOLD, metrics
        )
        equal += all(round(metrics[name]) == row[key] for name, key in _COUNTS.items())
        rows.append(row)
        theirs.append(metrics)
    print(f"AMBER descriptions: {equal:,} of {count:,} answers have equal counts in amber_g")
    ours = [amber.chair(rows), amber.cover(rows), amber.hal(rows), amber.cog(rows)]
    names = ("chair", "cover", "hal", "cog")
    packaged_scores = [getattr(packaged, f"amber_g_aggregate_{name}")(theirs) for name in names]
    exact = [_without_offsets(theirs, name) for name in names]
    for name, mine, other, corrected in zip(names, ours, packaged_scores, exact, strict=True):
        print(f"  {name:>5}: {mine:.4f}, amber_g {other:.4f}, without its 0.001 {corrected:.4f}")
    return equal == count and all(map(math.isclose, ours, exact))


def _without_offsets(metrics: Sequence[dict[str, float]], name: str) -> float:
    """The score of amber_g, whose denominators begin at 0.001 in every answer."""
    part, whole = {
        "chair": ("chair_score", "chair_num"),
        "cover": ("safe_cover_score", "safe_cover_num"),
        "hal": ("non_hallu_score", "non_hallu_num"),
        "cog": ("hallu_cover_score", "hallu_cover_num"),
    }[name]
    share = sum(each[part] for each in metrics) / sum(round(each[whole]) for each in metrics)
    return 100 * (1 - share if name == "hal" else share)


def discriminative(folder: Path, count: int, draw: random.Random) -> bool:
    """Compares AMBER's questions with `amber_g` of lmms-eval and with ms-vlmeval."""
    packaged = _lmms_eval("amber_g")
    documents = _annotations(folder, lambda kind: kind != "generative")
    zero = packaged.load_metrics(folder / "data/metrics.txt")
    vlmeval = _vlmeval()
    rows, metrics, table, alike = [], dict(zero), [], 0
    differences: collections.Counter[str] = collections.Counter()
    for number, doc in enumerate(draw.choices(documents, k=count + count // 10)):
        mixed = number >= count  # answers that the packages read in different ways
        answer = draw.choice(_MIXED if mixed else _CLEAR).format("tree")
        found = amber.yes_or_no(answer)
        alone = dict(zero)
        packaged.process_discriminative_task({"question_id": 0, "text": answer}, doc, alone)
        # In `amber_g` "no" within a word is no, and yes comes first.
        theirs = "yes" if "yes" in answer.lower() else "no" if "no" in answer.lower() else None
        assert round(alone["qa_correct_score"]) == (theirs == doc["truth"])
        other = vlmeval.YOrN_Extraction(answer)
        other = None if other == "Unknown" else other.lower()
        if mixed:
            differences[f"{answer!r}: {found}, amber_g {theirs}, ms-vlmeval {other}"] += 1
            continue
        alike += found == theirs == other
        rows.append(
            {"dimension": amber.DIMENSIONS[doc["type"]], "truth": doc["truth"], "answer": found}
        )
        packaged.process_discriminative_task({"question_id": 0, "text": answer}, doc, metrics)
        table.append({"category": doc["type"], "image_path": "", "score": other == doc["truth"]})
    scores = _packaged_scores(metrics)
    ours = [amber.accuracy(rows), amber.precision(rows), amber.recall(rows), amber.f1(rows)]
    print(f"AMBER questions: {alike:,} of {count:,} answers are read alike by all three")
    for name, mine, other in zip(_RATES, ours, scores, strict=True):
        print(f"  {name:>9}: {mine:.4f}, amber_g {other:.4f}")
    equal = all(map(math.isclose, ours, scores))
    import pandas

    rating = vlmeval.AMBER_rating(pandas.DataFrame(table))
    for name in ("existence", "attribute", "relation"):
        mine = amber.accuracy([row for row in rows if row["dimension"] == name])
        print(f"  {name:>9}: {mine:.4f}, ms-vlmeval {rating[name.title()]:.4f}")
        equal &= math.isclose(mine, rating[name.title()])
    for difference, times in sorted(differences.items()):
        print(f"  {times:>4} times {difference}")
    return equal and alike == count


def _packaged_scores(metrics: dict[str, float]) -> list[float]:
    correct, precise, found = (
        100 * metrics[f"{part}_score"] / round(metrics[f"{part}_num"])
        for part in ("qa_correct", "qa_ans_no", "qa_no")
    )
    return [correct, precise, found, 2 * precise * found / (precise + found)]


def chair(synonyms: Path, count: int, draw: random.Random) -> bool:
    """Compares the mentions of Object HalBench with CHAIR in lmms-eval's `coco_cap_chair`."""
    packaged = _lmms_eval("coco_cap_chair")
    lemmas = _tagged_lemmas(packaged)
    theirs_only = halbench.Vocabulary(
        {word: packaged.INVERSE_SYNONYM_DICT[word] for word in packaged.MSCOCO_OBJECTS},
        packaged.DOUBLE_WORD_DICT,
    )
    vocabulary = halbench.read_vocabulary(synonyms)
    everything = sorted(set(vocabulary.classes) | set(theirs_only.classes))
    classes = sorted(set(vocabulary.classes.values()))
    rows, results, equal = [], [], 0
    causes: collections.Counter[str] = collections.Counter()
    for _ in range(count):
        objects = draw.sample(classes, draw.randint(1, 8))
        answer = sentences(objects, everything, draw)
        _, theirs, _, _ = packaged.caption_to_words(answer)
        mentioned = halbench.mentions(lemmas(answer), theirs_only)
        equal += mentioned == theirs
        rows.append(halbench.count(answer, mentioned, objects))
        results.append({"answer": objects, "pred": theirs, "image_id": 0})
        if (ours := halbench.mentions(words.singular_words(answer), vocabulary)) != theirs:
            causes[_cause(answer, ours, lemmas, vocabulary, theirs_only)] += 1
    print(f"CHAIR: {equal:,} of {count:,} answers have equal mentions, with lmms-eval's word lists")
    mine = [halbench.mention_rate(rows), halbench.all_responses_rate(rows), halbench.recall(rows)]
    ends = ("chair_i", "chair_s", "recall")
    scores = [getattr(packaged, f"coco_cap_chair_aggregate_results_{end}")(results) for end in ends]
    for end, one, other in zip(ends, mine, scores, strict=True):
        print(f"  {end:>7}: {one:.4f}, coco_cap_chair {other:.4f}")
    for cause, times in causes.most_common():
        print(f"  {times:>5,} answers differ with the publisher's lists: {cause}")
    return equal == count and all(map(math.isclose, mine, scores))


def _tagged_lemmas(packaged: Any) -> Any:
    """The words of `coco_cap_chair`: lemmas of the part of speech that each has."""
    nltk, tagger = packaged.nltk, words._tagger()
    kinds = {"J": "a", "V": "v", "N": "n", "R": "r"}
    lemmatize = packaged.WordNetLemmatizer().lemmatize

    def lemmas(text: str) -> list[str]:
        tagged = tagger.tag(nltk.word_tokenize(text.lower()))
        return [lemmatize(word, pos=kinds.get(tag[0], "n")) for word, tag in tagged]

    nltk.pos_tag = tagger.tag  # reads its weights once
    return lemmas


def _cause(answer: str, ours: list[str], lemmas: Any, mine: Any, theirs: Any) -> str:
    """Returns why the mentions of an answer differ: words, their lemmas, or both."""
    if halbench.mentions(lemmas(answer), mine) == ours:
        return "synonyms of the publisher"
    if halbench.mentions(words.singular_words(answer), theirs) == ours:
        return "verbs that are read as objects"
    return "both"


def _annotations(folder: Path, wanted: Any) -> list[dict[str, Any]]:
    content = json.loads((folder / "data/annotations.json").read_text())
    return [each for each in content if wanted(each["type"])]


def _lmms_eval(task: str) -> types.ModuleType:
    """`utils.py` of a task, without what all of lmms-eval imports."""
    [root] = importlib.util.find_spec("lmms_eval").submodule_search_locations
    return _load(Path(root) / "tasks" / task / "utils.py")


def _vlmeval() -> types.ModuleType:
    """`vlmeval/dataset/utils/yorn.py`, without the packages that all of vlmeval imports."""
    [root] = importlib.util.find_spec("vlmeval").submodule_search_locations
    misc = _load(Path(root) / "smp/misc.py")
    smp = types.ModuleType("vlmeval.smp")
    smp.d2df, smp.load, smp.process_punctuation = dict, lambda data: data, misc.process_punctuation
    sys.modules |= {"vlmeval": types.ModuleType("vlmeval"), "vlmeval.smp": smp}
    return _load(Path(root) / "dataset/utils/yorn.py")


def _load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Prints the comparisons, and exits with 1 if one differs in a way that is not listed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.task_scorers", description=__doc__)
    parser.add_argument("--amber", required=True, type=Path, help="clone of AMBER")
    parser.add_argument("--synonyms", required=True, type=Path, help="synonyms_refine.txt")
    parser.add_argument("--vectors", default="en_core_web_lg", help="spaCy model")
    parser.add_argument("--count", default=2000, type=int, help="answers of each comparison")
    args = parser.parse_args()
    words.load_nltk()
    draw = random.Random(0)
    passed = [
        generative(args.amber, args.vectors, args.count, draw),
        discriminative(args.amber, args.count, draw),
        chair(args.synonyms, args.count, draw),
    ]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
