import dataclasses

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from moddistill.config import ColumnsConfig, SourceConfig
from moddistill.data.examples import encode_sides
from moddistill.data.image_decoding import ImageRules
from moddistill.data.images import PAD_COLOR, preprocess
from moddistill.data.indexing import IndexSpec
from moddistill.data.packing import RowPlan, Sample
from moddistill.data.rows import RowMaker, RowSpec
from moddistill.data.sources import Limits, Source
from moddistill.models.batch import make_batch

RULES = ImageRules(max_pixels=2**26, exif="apply", pad_color=PAD_COLOR)
SPEC = RowSpec(
    kind="conversation",
    template="chatml",
    max_length=240,
    image_size=4,
    image_tokens=2,
    images=RULES,
)


def talk(question, answer, **fields):
    human, gpt = {"from": "human", "value": question}, {"from": "gpt", "value": answer}
    return {"conversations": [human, gpt], **fields}


class Plan(RowPlan):
    """One row of the given records of the only source."""

    def __init__(self, source, records):
        lengths = source.lengths(np.array(records)).tolist()
        self.samples = tuple(Sample(0, *x) for x in zip(records, lengths, strict=True))

    def row(self, number):
        return self.samples


@pytest.fixture
def maker(small, tmp_path):
    def make(path, records, **changes):
        spec = dataclasses.replace(SPEC, **changes)
        index = IndexSpec(spec.kind, spec.template, spec.image_tokens, small, ColumnsConfig())
        source = Source(
            SourceConfig(path, str(tmp_path)), index, Limits(spec.max_length, 3), "config.data.a"
        )
        return RowMaker(Plan(source, records), [source], small, spec, image_slots=3)

    return make


@pytest.fixture
def three(data_file, image_file):
    image_file("a.png", seed=1)
    image_file("b.png", 9, 5, seed=2)
    return data_file(
        [
            talk("q", "zero"),
            talk("<image> or <image>?", "one", image=["a.png", "b.png"]),
            talk("<image>", "two", image="b.png"),
        ]
    )


def sides_of(made, number, small):
    return encode_sides(made.sources[0][number], "chatml", small, 2)


def test_row_holds_its_samples_one_after_the_other(maker, three, small, tmp_path):
    made = maker(three, [2, 0, 1])
    batch, rejected, _ = made(0)
    samples = [sides_of(made, number, small)[0] for number in (2, 0, 1)]
    lengths = [len(sample.tokens) for sample in samples]
    rest = 240 - sum(lengths)
    tokens = np.concatenate([*(sample.tokens for sample in samples), [small.pad_id] * rest])
    mask = np.concatenate([*(sample.loss_mask for sample in samples), [False] * rest])
    np.testing.assert_array_equal(batch.tokens, tokens)
    np.testing.assert_array_equal(batch.loss_mask, mask)
    segments = np.repeat([1, 2, 3, 0], [*lengths, rest])
    np.testing.assert_array_equal(batch.segments, segments)
    positions = np.concatenate([*(np.arange(length) for length in lengths), np.zeros(rest)])
    np.testing.assert_array_equal(batch.positions, positions)
    # Images in the order of their samples.
    for slot, name in enumerate(("b.png", "a.png", "b.png")):
        expected = preprocess(Image.open(tmp_path / name), 4)
        np.testing.assert_array_equal(batch.images[slot], expected)
    assert rejected == ()
    shapes = jax.tree.map(lambda x: x[0], make_batch(np.zeros, rows=1, length=240, images=(3, 4)))
    chex.assert_trees_all_equal_shapes_and_dtypes(batch, shapes)


def test_images_are_padded_with_the_colour_of_the_spec(maker, three, tmp_path):
    rules = dataclasses.replace(RULES, pad_color=(9, 8, 7))
    batch = maker(three, [2], images=rules)(0).batch
    expected = preprocess(Image.open(tmp_path / "b.png"), 4, (9, 8, 7))
    np.testing.assert_array_equal(batch.images[0], expected)
    assert not batch.images[1:].any()


def test_row_of_a_text_only_model_has_no_images(maker, data_file):
    assert maker(data_file([talk("q", "a")]), [0], image_tokens=0)(0).batch.images is None


def test_long_answer_is_truncated(maker, data_file, small):
    made = maker(data_file([talk("q", "word " * 400)]), [0])
    batch = made(0).batch
    np.testing.assert_array_equal(batch.tokens, sides_of(made, 0, small)[0].tokens[:240])
    assert batch.loss_mask[-1] and np.all(batch.segments == 1)


def test_bad_sample_is_padding_and_shifts_nothing(maker, three, tmp_path):
    good = maker(three, [2, 1, 0])(0).batch
    (tmp_path / "a.png").write_bytes(b"no image")
    made = maker(three, [2, 1, 0])
    batch, [rejected], _ = made(0)
    assert (rejected.file, rejected.line) == (three, 2)
    assert "a.png" in rejected.reason
    bad = good.segments == 2
    for name in ("tokens", "loss_mask", "segments", "positions"):
        kept, expected = getattr(batch, name), getattr(good, name)
        np.testing.assert_array_equal(kept[~bad], expected[~bad])
    assert not batch.segments[bad].any() and not batch.loss_mask[bad].any()
    # Images of the next sample follow those of the last good one.
    np.testing.assert_array_equal(batch.images[0], good.images[0])
    assert not batch.images[1:].any()


def test_row_of_bad_samples_only_is_padding(maker, three, tmp_path):
    (tmp_path / "b.png").unlink()
    batch, rejected, _ = maker(three, [2, 1])(0)
    assert len(rejected) == 2
    assert not batch.segments.any() and not batch.loss_mask.any() and not batch.images.any()


def test_both_sides_of_pairs_begin_at_the_same_positions(maker, data_file, image_file, small):
    image_file()
    path = data_file(
        [
            {"question": "<image> q", "image": "a.png", "chosen": "long " * 3, "rejected": "no"},
            {"question": "q", "chosen": "a", "rejected": "b b b b b"},
        ]
    )
    made = maker(path, [0, 1], kind="preference")
    batch = made(0).batch
    lengths = made.sources[0].lengths(np.arange(2))
    for number, side in enumerate((batch.chosen, batch.rejected)):
        for segment, start in ((1, 0), (2, int(lengths[0]))):
            expected = sides_of(made, segment - 1, small)[number]
            at = slice(start, start + len(expected.tokens))
            np.testing.assert_array_equal(side.tokens[at], expected.tokens)
            np.testing.assert_array_equal(side.loss_mask[at], expected.loss_mask)
            assert np.all(side.segments[at] == segment)
            assert side.positions[start] == 0
            assert np.count_nonzero(side.segments == segment) == len(expected.tokens)
    assert batch.images.shape == (3, 4, 4, 3) and batch.images[0].any()


def test_record_with_another_length_than_in_its_index_is_rejected(maker, data_file):
    path = data_file([talk("q", "abc")])
    made = maker(path, [0])
    made.sources[0].lengths = lambda numbers: np.full(len(numbers), 3)  # the file was another one
    batch, [rejected], _ = made(0)
    assert "record: expected 3 tokens as in its index, got" in rejected.reason
    assert not batch.segments.any()
