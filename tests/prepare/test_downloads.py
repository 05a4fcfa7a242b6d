import pytest

from moddistill.prepare.downloads import DOWNLOADS
from tests.prepare.conftest import image, read_rejected, read_shards, talk, write_json, write_zip

RED, BLUE = image((255, 0, 0)), image((0, 0, 255))
NAMES = ("llava_image_tune/coco/train2017/1.png", "llava_image/00/1.png", "mimicit_tune/LA/1.png")


def answers(folder):
    return [record["conversations"][1]["value"] for record in read_shards(folder)]


@pytest.fixture
def moe_llava(tmp_path):
    """A folder as published: one archive unpacked, the others not."""
    folder = tmp_path / "MoE-LLaVA"
    for name in ("train_json", "llava_image_tune/coco/train2017", "mimicit_tune"):
        (folder / name).mkdir(parents=True)
    (folder / "llava_image_tune/coco/train2017/1.png").write_bytes(RED)
    write_zip(folder / "llava_image.zip", [("llava_image/00/1.png", BLUE)])
    write_zip(folder / "mimicit_tune/LA.zip", [("LA/1.png", BLUE)])
    write_json(folder / "train_json/a.json", [talk(name, answer=name) for name in NAMES])
    write_json(folder / "train_json/b.json", [talk("lrv_tune/1.png", answer="b"), talk(answer="c")])
    return folder


def test_images_of_moe_llava_are_in_folders_and_archives_of_their_prefix(
    moe_llava, prepare, capsys
):
    folder = prepare("moe-llava", "--from", moe_llava)
    assert answers(folder) == [*NAMES, "c"]
    [(line, reason)] = read_rejected(folder)
    assert line == 1
    assert "got 'lrv_tune/1.png'" in reason
    warning = "no images for names below lrv_tune, lvis_tune, svit_tune: their records are rejected"
    assert warning in capsys.readouterr().err


def test_images_of_other_places_are_named_by_prefix(moe_llava, tmp_path, prepare):
    archive = write_zip(tmp_path / "lrv.zip", [("1.png", RED)])
    flags = ("--records", "train_json/b.json", "--images", f"lrv_tune={archive}")
    assert answers(prepare("moe-llava", "--from", moe_llava, *flags)) == ["b", "c"]


def test_records_of_a_prefix_are_left_out_of_mobilevlm(tmp_path, prepare):
    coco = write_zip(tmp_path / "train2017.zip", [("train2017/1.png", RED)])
    names = ("coco/train2017/1.png", "sam/images/1.png", "sam/images/missing.png")
    (tmp_path / "sam/images").mkdir(parents=True)
    (tmp_path / "sam/images/1.png").write_bytes(BLUE)
    write_json(tmp_path / "MobileVLM_V2_FT_Mix2M.json", [talk(name, answer=name) for name in names])
    flags = ("mobilevlm", "--from", tmp_path, "--images", f"coco={coco}")
    folder = prepare(*flags, to="all")
    assert answers(folder) == ["coco/train2017/1.png", "sam/images/1.png"]
    folder = prepare(*flags, "--leave-out", "sam/", to="without")
    assert answers(folder) == ["coco/train2017/1.png"]
    assert read_rejected(folder) == []


def test_published_prefixes_are_those_of_the_reference():
    assert list(DOWNLOADS["moe-llava"].images) == [
        "llava_image", "llava_image_tune", "lrv_tune", "lvis_tune", "svit_tune", "mimicit_tune",
    ]  # fmt: skip
