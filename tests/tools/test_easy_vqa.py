"""The builder of the demo data, on a small imitation of the published package."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageDraw

from moddistill.data import tokenizer
from tools.easy_vqa import images, published, records
from tools.easy_vqa.__main__ import Options, build, is_built, main

PINK = (250, 230, 240)
OPTIONS = Options(augmentations=2, preference_pairs=60)


def draw_image(box, shape="rectangle", color="red"):
    image = Image.new("RGB", (64, 64), PINK)
    draw = ImageDraw.Draw(image)
    {"rectangle": draw.rectangle, "circle": draw.ellipse}[shape](box, fill=color)
    return image


def visible(image):
    """Bounding box of the shape, and its number of pixels."""
    mask = ImageChops.difference(image, Image.new("RGB", image.size, PINK)).convert("L")
    return mask.getbbox(), sum(mask.histogram()[1:])


def questions_about(image, color, shape):
    wrong = "teal" if color != "teal" else "red"
    return [
        [f"what is the {color} shape?", shape, image],
        ["what color is the shape?", color, image],
        [f"is there a {wrong} shape?", "no", image],
        [f"is there not a {color} shape?", "no", image],
        [f"is a {shape} present?", "yes", image],
    ]


@pytest.fixture
def source(tmp_path, monkeypatch):
    """40 red rectangles, the last of which no published answer determines, and 5 for testing."""
    folder = tmp_path / "published"
    for split, count in {"train": 40, "test": 5}.items():
        (folder / split / "images").mkdir(parents=True)
        rows = []
        for i in range(count):
            draw_image((i, 10, i + 10, 20)).save(folder / split / f"images/{i}.png")
            rows += questions_about(i, "red", "rectangle")
        if split == "train":
            rows = [row for row in rows if row[2] != 39] + [["is there a teal shape?", "no", 39]]
        (folder / split / "questions.json").write_text(json.dumps(rows))
    monkeypatch.setattr(published, "package_folder", lambda: folder)
    return folder


def read(out, name):
    return json.loads((out / f"{name}.json").read_text())


def question(text, answer):
    return published.Question(text, answer, 3)


@pytest.mark.parametrize(
    ("text", "answer", "color", "shape"),
    [
        ("what color is the rectangle?", "blue", "blue", "rectangle"),
        ("what is the red shape?", "circle", "red", "circle"),
        ("does the image contain a teal shape?", "yes", "teal", None),
        ("is no triangle present?", "no", None, "triangle"),
        ("is there not a gray shape in the image?", "yes", None, None),
        ("is a circle present?", "no", None, None),
    ],
)
def test_value_deduced_from_one_answer(text, answer, color, shape):
    asked = [question(text, answer)]
    assert published.deduce(asked, published.COLORS) == color
    assert published.deduce(asked, published.SHAPES) == shape


def test_ruling_out_all_other_values_determines_the_last():
    asked = [question("is a circle present?", "no"), question("is no triangle present?", "yes")]
    assert published.deduce(asked, published.SHAPES) == "rectangle"


def test_contradicting_answers_are_an_error():
    asked = [question("is a circle present?", "no"), question("what shape is present?", "circle")]
    with pytest.raises(ValueError, match="train image 3 contradict"):
        published.deduce(asked, published.SHAPES)


def test_missing_package_is_an_error_with_the_install_command(monkeypatch):
    monkeypatch.setattr(published.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install easy-vqa==1\.0"):
        published.package_folder()


@pytest.mark.parametrize("box", [(0, 0, 9, 9), (50, 54, 63, 63), (20, 24, 44, 40)])
def test_shifted_shapes_stay_inside_the_image(box):
    original = draw_image(box, "circle")
    (left, top, right, bottom), size = visible(original)
    rng, places = random.Random(0), set()
    for _ in range(40):
        moved, moved_size = visible(images.flip_and_shift(original, rng))
        assert moved_size == size
        assert (moved[2] - moved[0], moved[3] - moved[1]) == (right - left, bottom - top)
        assert min(abs(moved[0] - left), abs(64 - moved[2] - left)) <= images.MAX_SHIFT
        assert abs(moved[1] - top) <= images.MAX_SHIFT
        places.add(moved)
    assert len(places) > 20


def test_files_of_the_folder_match_their_description(source, tmp_path):
    out = tmp_path / "deep" / "out"
    counts = build(out, OPTIONS)
    expected = {
        "images/train": 40,
        "images/test": 5,
        "images/augmented": 80,
        "captions.json": 39 * 3,
        "train.json": 39 * 5 + 1,
        "test.json": 25,
        "preference_train.json": 54,
        "preference_test.json": 6,
        "text.json": 39 * (5 + 2),
        "train images without a caption": 1,
    }
    assert counts == expected
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    for name in ("captions", "train", "test", "preference_train", "preference_test"):
        rows = read(out, name)
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            assert (out / "images" / row["image"]).is_file()
            assert row["conversations"][0]["value"].startswith("<image>\n")
    captions = {row["conversations"][1]["value"] for row in read(out, "captions")}
    assert captions == {"a red rectangle"}
    assert read(out, "test")[1]["conversations"] == [
        {"from": "human", "value": "<image>\nwhat color is the shape?"},
        {"from": "gpt", "value": "red"},
    ]
    assert all("image" not in row for row in read(out, "text"))
    assert (out / "tokenizer" / "tokenizer.json").is_file()


def test_held_out_preference_pairs_are_of_other_images(source, tmp_path):
    build(tmp_path / "out", OPTIONS)

    def originals(name):
        rows = read(tmp_path / "out", name)
        assert all(row["chosen"] != row["rejected"] for row in rows)
        assert sum(row["rejected"] == "yes" for row in rows) == len(rows) / 2
        return {Path(row["image"]).stem.split("_")[0] for row in rows}

    assert not originals("preference_train") & originals("preference_test")


def test_wrong_answers_are_of_the_same_kind():
    rng = random.Random(0)
    for kind in (published.YES_NO, published.COLORS, published.SHAPES):
        for value in kind:
            others = {records.another(value, rng) for _ in range(200)}
            assert others == set(kind) - {value}


def test_same_options_give_the_same_bytes(source, tmp_path):
    for name in ("one", "two"):
        build(tmp_path / name, OPTIONS)
    files = [path for path in (tmp_path / "one").rglob("*") if path.is_file()]
    for path in files:
        twin = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == twin.read_bytes()


def test_questions_of_one_image_may_share_a_record():
    asked = [question(f"question {n}?", "yes") for n in range(3)]
    first, second = records.question_records({3: asked}, variants=2, questions_per_record=2)
    assert [turn["value"] for turn in first["conversations"]] == [
        "<image>\nquestion 0?",
        "yes",
        "question 1?",
        "yes",
    ]
    assert (first["image"], second["image"]) == ("train/3.png", "augmented/3_1.png")


def test_complete_folder_is_unchanged_and_others_are_errors(source, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--out", str(out), "--preference_pairs", "60", "--augmentations", "1"]
    main(flags)
    assert "40  images/train" in capsys.readouterr().out
    main(flags)
    assert capsys.readouterr().out == f"{out} is complete\n"
    with pytest.raises(
        SystemExit, match=r"error: --out: .* built with .*'seed': 5.*, not .*'seed': 0"
    ):
        main([*flags, "--seed", "5"])
    with pytest.raises(
        ValueError, match="--out: expected a new folder, or one that this command built, got "
    ):
        is_built(source, OPTIONS)


def test_failed_build_leaves_no_folder(source, tmp_path, monkeypatch):
    def fail(texts, vocab_size):
        raise RuntimeError("no tokenizer")

    monkeypatch.setattr(tokenizer, "train_bpe", fail)
    with pytest.raises(RuntimeError, match="no tokenizer"):
        build(tmp_path / "data" / "out", OPTIONS)
    assert list((tmp_path / "data").iterdir()) == []


def test_too_many_preference_pairs_are_an_error(source, tmp_path):
    with pytest.raises(ValueError, match=r"pairs: expected fewer, .* of kind 'no'.*, got \d+"):
        build(tmp_path / "out", Options(preference_pairs=10_000))


def test_options_out_of_range_are_errors():
    with pytest.raises(ValueError, match="--questions_per_record: expected >= 1, got 0"):
        Options(questions_per_record=0)
