import dataclasses
import json
import logging
import sys
from collections import Counter
from pathlib import Path

import chex
import numpy as np
import pytest

from moddistill.config import DataConfig, SourceConfig
from moddistill.data.examples import ExampleSpec
from moddistill.data.pipeline import make_dataset
from moddistill.data.quarantine import Quarantine
from moddistill.models.batch import PreferenceBatch, make_batch

SPEC = ExampleSpec("vicuna", max_length=160, max_images=1, image_size=4, image_tokens=2)


def talk(question, answer, **fields):
    human, gpt = {"from": "human", "value": question}, {"from": "gpt", "value": answer}
    return {"conversations": [human, gpt], **fields}


@pytest.fixture
def stream(small, tmp_path):
    """Makes a dataset of batches from record files."""

    def make(*paths, workers=0, kind="conversation", weights=None, spec=SPEC, **options):
        sources = {
            f"source{number}": SourceConfig(path, str(tmp_path), weight)
            for number, (path, weight) in enumerate(
                zip(paths, weights or [1.0] * len(paths), strict=True)
            )
        }
        config = DataConfig(sources, workers=workers)
        options = {"batch_size": 4, "seed": 0} | options
        path = str(tmp_path / "quarantine.jsonl")
        return make_dataset(config, spec, small, kind=kind, quarantine_path=path, **options)

    return make


@pytest.fixture
def answers(small):
    """Returns the answers in batches."""

    def read(*batches):
        return [
            small.decode(tokens[mask].tolist()).strip()
            for batch in batches
            for tokens, mask in zip(batch.tokens, batch.loss_mask, strict=True)
        ]

    return read


@pytest.fixture
def numbered(data_file, image_file):
    """Writes `count` records whose answers are their numbers, every second one with an image."""

    def write(count, name="data.json", start=0):
        image_file()
        images = [{"image": "a.png"} if number % 2 else {} for number in range(count)]
        return data_file(
            [
                talk("<image> q" if image else "q", str(start + number), **image)
                for number, image in enumerate(images)
            ],
            name,
        )

    return write


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_batches_are_stacked_samples(stream, numbered):
    batch = next(iter(stream(numbered(10), batch_size=3)))
    expected = make_batch(np.zeros, rows=3, length=160, images=(1, 4))
    chex.assert_trees_all_equal_shapes_and_dtypes(batch, expected)


def test_preference_batches_have_two_sides(stream, data_file):
    path = data_file([{"question": "q", "chosen": "a", "rejected": "b"}])
    batch = next(iter(stream(path, kind="preference", batch_size=2)))
    assert isinstance(batch, PreferenceBatch)
    assert batch.chosen.tokens.shape == batch.rejected.loss_mask.shape == (2, 160)
    assert batch.chosen.images is batch.rejected.images is None
    assert batch.images.shape == (2, 1, 4, 4, 3)


def test_every_epoch_holds_each_record_once_in_another_order(stream, numbered, answers):
    order = answers(*take(iter(stream(numbered(12))), 6))
    first, second = order[:12], order[12:]
    assert sorted(first, key=int) == sorted(second, key=int) == [str(n) for n in range(12)]
    assert first != second
    assert first != sorted(first, key=int)


def test_order_depends_only_on_the_seed(stream, numbered, answers):
    path = numbered(12)
    orders = [answers(*take(iter(stream(path, seed=seed)), 3)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_sources_are_mixed_by_weight_and_shuffled_independently(stream, numbered, answers):
    paths = [numbered(10, "a.json"), numbered(10, "b.json", start=100)]
    order = answers(*take(iter(stream(*paths, weights=[3.0, 1.0])), 10))
    assert Counter(int(answer) >= 100 for answer in order) == {False: 30, True: 10}
    order = answers(*take(iter(stream(*paths)), 5))
    first = [int(answer) for answer in order if int(answer) < 100]
    assert first != [int(answer) - 100 for answer in order if int(answer) >= 100]


@pytest.mark.parametrize("count", [2, 3])
def test_union_of_process_shards_is_the_stream_of_one_process(count, stream, numbered, answers):
    paths = [numbered(7, "a.json"), numbered(12, "b.json", start=100)]
    single = answers(*take(iter(stream(*paths, batch_size=12)), 4))
    shares = [
        answers(
            *take(
                iter(
                    stream(
                        *paths,
                        batch_size=12 // count,
                        process_index=index,
                        process_count=count,
                    )
                ),
                4,
            )
        )
        for index in range(count)
    ]
    assert [answer for step in zip(*shares, strict=True) for answer in step] == single


@pytest.fixture
def partly_invalid(data_file, image_file, tmp_path):
    """Writes 13 records: one has a corrupt image, one a long question, one an empty answer."""
    image_file()
    (tmp_path / "broken.png").write_bytes(Path(tmp_path / "a.png").read_bytes()[:50])
    records = [talk("<image>", str(number), image="a.png") for number in range(10)]
    records += [talk("<image>", "10", image="broken.png"), talk("word " * 200, "11")]
    return data_file([*records, talk("q", "")])


@pytest.mark.parametrize("workers", [0, 2])
def test_iterator_state_restores_the_exact_next_batches(workers, stream, partly_invalid, answers):
    iterator = iter(stream(partly_invalid, workers=workers))
    take(iterator, 3)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 5)
    iterator.set_state(state)
    chex.assert_trees_all_equal(take(iterator, 5), expected)
    iterator.close()
    fresh = iter(stream(partly_invalid, workers=workers))
    fresh.set_state(state)
    chex.assert_trees_all_equal(take(fresh, 5), expected)
    fresh.close()
    # Workers do not change the order, with rejected records in it either.
    without_workers = answers(*take(iter(stream(partly_invalid)), 8)[3:])
    assert answers(*expected) == without_workers


def test_iterator_state_is_independent_of_the_number_of_workers(stream, partly_invalid):
    expected = take(iter(stream(partly_invalid)), 9)
    state, read = None, []
    for workers in (0, 2, 3, 0):
        iterator = iter(stream(partly_invalid, workers=workers))
        if state:
            iterator.set_state(state)
        read += take(iterator, 2)
        state = json.loads(json.dumps(iterator.get_state()))
        iterator.close()
    chex.assert_trees_all_equal(read, expected[:8])


def test_order_is_independent_of_the_order_of_sources_in_the_config(
    stream, numbered, small, tmp_path
):
    paths = {"a": numbered(10, "a.json"), "b": numbered(10, "b.json", start=100)}
    orders = []
    for names in ("ab", "ba"):
        config = DataConfig({name: SourceConfig(paths[name], str(tmp_path)) for name in names})
        path = str(tmp_path / "q.jsonl")
        options = {"kind": "conversation", "batch_size": 4, "seed": 0, "quarantine_path": path}
        orders.append(take(iter(make_dataset(config, SPEC, small, **options)), 4))
    chex.assert_trees_all_equal(*orders)


def test_iterator_state_is_one_integer(stream, numbered):
    iterator = iter(stream(numbered(8)))
    take(iterator, 3)
    assert iterator.get_state() == {"next_index": 12}


def test_rejected_records_are_quarantined_once_and_in_no_batch(
    stream, partly_invalid, answers, tmp_path
):
    batches = take(iter(stream(partly_invalid, batch_size=5)), 8)
    assert Counter(answers(*batches)) == {str(number): 4 for number in range(10)}
    assert all(np.unique(batch.images[:, 0].reshape(5, -1), axis=0).any() for batch in batches)
    take(iter(stream(partly_invalid)), 8)
    quarantine = Quarantine(str(tmp_path / "quarantine.jsonl"))
    lines = Path(quarantine.path).read_text().splitlines()
    reasons = {item["line"]: item["reason"] for item in map(json.loads, lines)}
    assert len(lines) == quarantine.count == 3
    assert "broken.png: expected a readable image" in reasons[11]
    assert "expected an answer token within max_length 160" in reasons[12]
    assert reasons[13] == "answer: expected a text that is not blank, got ''"


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_records_are_used_and_listed_once(workers, stream, data_file, tmp_path):
    """They are used up to `max_length`, and listed once in several epochs."""
    path = data_file([talk("q", "1"), talk("q", "two " * 200)])
    batches = iter(stream(path, workers=workers))
    for _ in range(3):
        next(batches)
    listed = [json.loads(line) for line in (tmp_path / "truncated.jsonl").read_text().splitlines()]
    assert [item["line"] for item in listed] == [2]
    assert listed[0]["reason"].endswith("tokens are truncated to 160")
    assert not (tmp_path / "quarantine.jsonl").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_source_without_usable_records_is_an_error(workers, stream, numbered, data_file):
    bad = data_file([talk("word " * 200, "a"), talk("word " * 300, "b")], "bad.json")
    iterator = iter(stream(numbered(4), bad, workers=workers))
    with pytest.raises(
        ValueError, match=r"bad.json: expected usable records, got 2 rejected, see .*jsonl"
    ):
        take(iterator, 10)
    iterator.close()


TEXT_ONLY = dataclasses.replace(SPEC, image_size=0, image_tokens=0)


def test_records_with_images_are_refused_for_a_text_only_model(stream, numbered):
    message = (
        r"^config\.data\.sources\.source1: expected records without images for a model without a "
        r"vision encoder .*--config\.vision=MODEL.*, got images in 4 of 9 records"
    )
    with pytest.raises(ValueError, match=message):
        stream(numbered(1), numbered(9, "b.json"), spec=TEXT_ONLY)
    with pytest.raises(ValueError, match=r"^config\.data\.source0: .*got images in 4 of 9 records"):
        stream(numbered(9), spec=TEXT_ONLY, origin="config.data")


def test_preference_pairs_with_images_are_refused_for_a_text_only_model(
    stream, data_file, image_file
):
    image_file()
    pair = {"question": "q", "chosen": "a", "rejected": "b"}
    path = data_file([pair | {"image": "a.png"}, pair])
    with pytest.raises(ValueError, match=r"source0: .*got images in 1 of 2 records"):
        stream(path, kind="preference", spec=TEXT_ONLY)


def test_text_only_batches_have_no_images(stream, numbered):
    assert next(iter(stream(numbered(1), spec=TEXT_ONLY, batch_size=2))).images is None


def test_unusable_records_are_logged_before_the_first_batch(stream, data_file, image_file, caplog):
    image_file()
    two = talk("<image> <image>", "x", image=["a.png"] * 2)
    path = data_file([two, two, talk("q", ""), talk("q", "a")])
    with caplog.at_level(logging.WARNING, "moddistill"):
        stream(path)
    name = "config.data.sources.source0"
    assert f"{name}: 1 of 4 records break the format and are left out" in caplog.text
    assert f"{name}: 2 of 4 records have more than 1 images (config.data.max_images)" in caplog.text


def test_invalid_data_config_is_an_error(stream, numbered):
    with pytest.raises(
        ValueError, match=r"^record kind: .*'preferences' \(did you mean 'preference'"
    ):
        stream(numbered(1), kind="preferences")
    with pytest.raises(
        ValueError, match=r"^config.data.sources: expected .*NAME.path=FILE.*, got none"
    ):
        stream()
    with pytest.raises(ValueError, match=r"data.sources.source0.weight: expected > 0, got 0.0"):
        stream(numbered(1), weights=[0.0])


def test_data_modules_do_not_import_jax_or_torch():
    modules = [name for name in sys.modules if name.startswith("moddistill.data.")]
    assert len(modules) >= 6
    for name in modules:
        source = Path(sys.modules[name].__file__).read_text()
        assert "import jax" not in source
        assert "torch" not in source
