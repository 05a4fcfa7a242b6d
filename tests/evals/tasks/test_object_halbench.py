"""Object HalBench: the publisher's files, and mentions and counts by hand."""

import json

import pytest

from moddistill.evals.tasks._task_utils.errors import TaskError
from moddistill.evals.tasks.object_halbench import utils

IRREGULAR = {"children": "child", "glasses": "glas", "locomotives": "locomotive", "men": "man"}


def singular(text):
    """Words as WordNet's lemmatizer has them, for the words of these tests."""
    words = text.lower().replace(".", " .").replace(",", " ,").split()
    return [IRREGULAR.get(word, word) for word in words]


@pytest.fixture
def vocabulary(halbench_folder):
    return utils.read_vocabulary(halbench_folder / "synonyms_refine.txt")


def test_documents_have_the_objects_that_are_segmented_or_in_a_caption(halbench_folder):
    first, second = utils.read_documents(halbench_folder, singular)
    assert (first["question"], first["image_id"]) == ("What is it?", 7)
    assert first["objects"] == ["chair", "person"]
    assert second["objects"] == ["train"]
    assert second["image"].startswith(b"\xff\xd8")  # the bytes of a JPEG


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("A man and two children.", ["person", "person"]),
        ("The passenger train on the train track.", ["train"]),
        ("A passenger jet by the jet.", ["airplane", "airplane"]),
        ("A bow tie, a tie and a bow.", ["tie", "tie", "tie"]),
        ("The seat of the toilet.", ["toilet"]),
        ("The seat of the train.", ["chair", "train"]),
        ("Two wine glasses.", ["wine glass"]),
        ("A baby bear and an adult panda with a hot dog.", ["bear", "bear", "hot dog"]),
        # `coco_cap_chair` of lmms-eval reads "seated" as the verb "seat", and that as a chair.
        ("She is seated.", []),
    ],
)
def test_mentions_are_words_and_pairs_of_words_of_the_classes(text, classes, vocabulary):
    assert utils.mentions(singular(text), vocabulary) == classes


def test_rates_are_of_responses_with_objects_and_of_mentions():
    """Four answers: no hallucination, one of three mentions, two of two, and no object."""
    rows = [
        utils.count("a b", ["person"], ["person", "chair"]),
        utils.count("a b c", ["person", "train", "chair"], ["person", "chair"]),
        utils.count("a", ["train", "train"], ["person"]),
        utils.count("a b", [], ["person"]),
    ]
    assert utils.response_rate(rows) == 100 * 2 / 3
    assert utils.mention_rate(rows) == 50
    assert utils.all_responses_rate(rows) == 50
    assert utils.recall(rows) == 100 * 3 / 6
    assert utils.with_objects(rows) == 3
    assert utils.average_words(rows) == 2
    assert utils.mention_rate(rows[3:]) == "N/A"


def test_an_answer_is_scored_with_the_publishers_words(halbench_folder, monkeypatch):
    monkeypatch.setattr(utils, "singular_words", singular)
    utils._vocabulary.cache_clear()
    [doc, _] = utils.read_documents(halbench_folder, singular)
    found = utils.process_results(doc, ["A man on a train."])
    utils._vocabulary.cache_clear()
    assert len(found) == 6
    assert utils.mention_rate([found["object_halbench_mention"]]) == 50
    assert utils.doc_to_target(doc) == "chair, person"


def test_an_image_without_captions_is_an_error(halbench_folder):
    path = halbench_folder / "annotations/captions_val2014.json"
    path.write_text(json.dumps({"annotations": []}))
    with pytest.raises(TaskError, match="annotations: no captions of image 9"):
        utils.read_documents(halbench_folder, singular)
