"""AMBER: the publisher's files, and counts by hand."""

import json
import sys
import types

import pytest

from moddistill.evals.tasks._task_utils import nouns
from moddistill.evals.tasks._task_utils.errors import TaskError
from moddistill.evals.tasks._task_utils.published_files import find_folder
from moddistill.evals.tasks.amber import utils

NEAR = {("guy", "man"), ("cloud", "sky"), ("cat", "dog")}


def similar(one, other):
    return one == other or (one, other) in NEAR


@pytest.fixture
def lists(amber_folder):
    association = {"guy": [], "cloud": [], "cat": []}  # known to be objects
    found = utils.read_word_lists(amber_folder)
    return found._replace(
        association={**found.association, **association}, objects=found.objects | set(association)
    )


@pytest.fixture
def documents(amber_folder):
    return utils.read_documents(amber_folder)


def test_documents_have_query_image_and_annotation(amber_folder, documents):
    assert documents[0] == {
        "id": 1,
        "type": "generative",
        "question": "Describe this image.",
        "image": str(amber_folder / "image/AMBER_2.jpg"),
        "truth": ["sky", "person", "table"],
        "hallu": ["dog"],
    }
    assert [doc["truth"] for doc in documents[2:]] == [["yes"], ["no"], ["no"], ["yes"]]
    assert [utils.is_generative(doc) for doc in documents] == [True] * 2 + [False] * 4


def test_word_lists_are_the_publishers(amber_folder):
    lists = utils.read_word_lists(amber_folder)
    assert lists.association["person"] == ["man", "woman"]
    assert lists.safe == {"object", "sunshine"}
    assert {"sky", "puppy", "desk", "sunshine"} < lists.objects


@pytest.mark.parametrize(
    ("mentioned", "counts"),
    [
        # (objects, hallucinated, covered, imagined)
        (["sky", "man", "woman", "desk"], (4, 0, 3, 0)),  # man and woman are one person
        (["photo", "idea"], (0, 0, 0, 0)),  # no objects of the lists
        (["dog"], (1, 1, 0, 1)),
        (["puppy", "bird"], (2, 2, 0, 1)),  # a bird is not among those that people imagine here
        (["sunshine"], (1, 0, 0, 0)),  # a safe word is an object, and never hallucinated
        (["guy", "cloud"], (2, 0, 2, 0)),  # near-synonyms of man and sky
        (["cat"], (1, 1, 0, 1)),  # a near-synonym of what people imagine
        (["sky", "sky", "bird", "bird"], (4, 2, 1, 0)),
    ],
)
def test_objects_of_a_description_are_covered_or_hallucinated(mentioned, counts, lists):
    found = utils.describe(mentioned, ["sky", "person", "table"], ["dog"], lists, similar)
    names = ("objects", "hallucinated", "covered", "imagined")
    assert tuple(found[name] for name in names) == counts
    assert (found["truth"], found["hallu"]) == (3, 1)


def test_scores_of_descriptions(lists):
    rows = [
        utils.describe(mentioned, ["sky", "person"], ["dog", "bird"], lists, similar)
        for mentioned in (["sky", "man", "dog"], ["sky"], [], ["bird", "table"])
    ]
    assert utils.chair(rows) == 100 * 3 / 6
    assert utils.cover(rows) == 100 * 3 / 8
    assert utils.hal(rows) == 50
    assert utils.cog(rows) == 100 * 2 / 8


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("Yes, the sky is sunny.", "yes"),
        ("There is no dog.", "no"),
        # lmms-eval's amber_g reads "no" in these words, and yes before no.
        ("I know.", None),
        ("It is not sunny.", None),
        ("There is snow.", None),
        ("No. Yes, maybe.", "no"),
        # ms-vlmeval reads neither.
        ("Yes, but no dog", "yes"),
        ("", None),
    ],
)
def test_the_first_yes_or_no_of_an_answer_counts(answer, read):
    assert utils.yes_or_no(answer) == read


def test_scores_of_questions(documents):
    """Positive is the answer no, as in the paper."""
    answers = ["Yes.", "No.", "Yes", "Perhaps."]
    pairs = zip(documents[2:], answers, strict=True)
    results = [utils.process_results(doc, [text]) for doc, text in pairs]
    rows = [each["amber_f1"] for each in results]
    assert [row["dimension"] for row in rows] == ["attribute", "attribute", "existence", "relation"]
    measures = utils.accuracy, utils.precision, utils.recall, utils.f1, utils.unclear
    assert [measure(rows) for measure in measures] == [50, 100, 50, 100 * 2 / 3, 25]
    assert [name for name in results[2] if "existence" in name] == [
        f"amber_{rate}_existence" for rate in ("accuracy", "precision", "recall", "f1")
    ]
    assert utils.accuracy_existence([results[2]["amber_accuracy_existence"]]) == 0
    assert utils.precision([rows[0]]) == "N/A"  # no answer is no


def test_the_amber_score_needs_both_parts(lists):
    [row] = [utils.describe(["sky", "dog"], ["sky"], ["dog"], lists, similar)]
    answers = [{"answer": "no", "truth": "no"}, {"answer": "no", "truth": "yes"}]
    assert utils.overall([row, *answers]) == pytest.approx((50 + 100 * 2 / 3) / 2)
    assert utils.overall(answers) == "N/A"


def test_a_description_is_scored_by_its_nouns(documents, monkeypatch):
    monkeypatch.setattr(nouns, "nouns", lambda text: text.split())
    utils._scorer.cache_clear()
    monkeypatch.setattr(nouns.Vectors, "__init__", lambda self, model, threshold: None)
    monkeypatch.setattr(nouns.Vectors, "similar", lambda self, one, other: one == other)
    found = utils.process_results(documents[0], ["sky bird"])
    utils._scorer.cache_clear()
    assert found.keys() == {"amber_chair", "amber_cover", "amber_hal", "amber_cog", "amber_score"}
    assert utils.chair([found["amber_chair"]]) == 50


def test_a_suffix_is_for_questions_only(documents):
    settings = {"pre_prompt": "", "post_prompt": "\nPlease answer yes or no."}
    assert utils.doc_to_text(documents[0], settings) == "Describe this image."
    assert utils.doc_to_text(documents[2], settings) == "Is it so?\nPlease answer yes or no."


def files(task):
    path = utils.Path(utils.__file__).parents[1] / task / "files.json"
    return json.loads(path.read_text())


def test_missing_files_are_named_with_where_they_are_published(amber_folder, monkeypatch):
    assert find_folder(files("amber")) == amber_folder
    (amber_folder / "data/relation.json").unlink()
    message = r"^\$AMBER_DIR: expected a folder with data/relation.json \(https://.*, got .*AMBER$"
    with pytest.raises(TaskError, match=message):
        find_folder(files("amber"))
    monkeypatch.delenv("AMBER_DIR")
    with pytest.raises(
        TaskError, match=r"data/safe_words.txt \(https://.*\); image \(.*, got nothing$"
    ):
        find_folder(files("amber"))


def test_missing_images_are_counted(amber_folder):
    (amber_folder / "image/AMBER_2.jpg").unlink()
    with pytest.raises(TaskError, match=r"AMBER/image: 1 of 2 images are missing: AMBER_2.jpg$"):
        utils.read_documents(amber_folder)


def spacy_with(vectors):
    """A module `spacy` whose models have vectors, by word."""

    class Document:
        def __init__(self, word):
            self.vector_norm = abs(vectors.get(word, 0))
            self._value = vectors.get(word, 0)

        def similarity(self, other):
            return 1 - abs(self._value - other._value)

    vocabulary = types.SimpleNamespace(vectors=types.SimpleNamespace(size=len(vectors)))
    language = types.SimpleNamespace(vocab=vocabulary, make_doc=Document)
    return types.SimpleNamespace(load=lambda model: language)


def test_words_with_vectors_above_the_threshold_are_similar(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", spacy_with({"man": 1.0, "guy": 0.9, "dog": 0.5}))
    words = nouns.Vectors("any", 0.8)
    assert words.similar("guy", "man")
    assert not words.similar("dog", "man")
    assert not words.similar("dog", "unknown")
    assert words.similar("unknown", "unknown")


def test_a_model_without_vectors_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", spacy_with({}))
    with pytest.raises(TaskError, match="expected a model with vectors, got 'en_core_web_sm'"):
        nouns.Vectors("en_core_web_sm", 0.8)


@pytest.mark.parametrize(
    ("package", "use"),
    [("spacy", lambda: nouns.Vectors("en_core_web_lg", 0.8)), ("nltk", nouns.load_nltk)],
)
def test_a_package_that_is_not_installed_is_named_with_its_command(package, use, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TaskError, match=f"pip install {package}; python -m {package}"):
        use()
