import os
import pickle

import pytest

from moddistill.errors import UserError
from moddistill.prepare.image_store import ImageStore, is_below, open_places, parse_images
from tests.prepare.conftest import image, write_tar, write_zip


@pytest.fixture
def store(tmp_path):
    """Opens the store of the values of `--images`."""

    def open_store(*flags):
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        places, _ = open_places(parse_images([str(flag) for flag in flags]), work)
        return ImageStore(places)

    return open_store


def folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def test_images_of_folders_and_archives_are_found_by_name(tmp_path, store):
    images = store(
        folder(tmp_path / "folder", {"a/1.png": b"1"}),
        write_zip(tmp_path / "a.zip", [("b/2.png", b"2")]),
        write_tar(tmp_path / "a.tar", [("c/3.png", b"3")]),
    )
    names = ("a/1.png", "b/2.png", "c/3.png")
    assert [images.read(name).data for name in names] == [b"1", b"2", b"3"]
    assert images.read("./b//2.png").name == "./b//2.png"


def test_an_archive_below_a_prefix_may_have_the_prefix_in_its_names_or_not(tmp_path, store):
    without = write_zip(tmp_path / "train2017.zip", [("train2017/1.jpg", b"1")])
    within = write_zip(tmp_path / "llava.zip", [("llava/2.jpg", b"2")])
    images = store(f"coco={without}", f"llava={within}")
    assert images.read("coco/train2017/1.jpg").data == b"1"
    assert images.read("llava/2.jpg").data == b"2"
    with pytest.raises(UserError, match="expected a file in"):
        images.read("train2017/1.jpg")


def test_several_archives_of_one_prefix_are_searched_in_order(tmp_path, store):
    first = write_zip(tmp_path / "1.zip", [("x", b"1"), ("y", b"1")])
    second = write_zip(tmp_path / "2.zip", [("y", b"2"), ("z", b"2")])
    images = store(f"vg={first}", f"vg={second}")
    assert [images.read(f"vg/{name}").data for name in "xyz"] == [b"1", b"1", b"2"]


def test_the_longest_prefix_is_searched_first(tmp_path, store):
    images = store(
        folder(tmp_path / "all", {"a/b/x": b"1", "a/b/y": b"1"}),
        f"a={folder(tmp_path / 'a', {'b/x': b'2'})}",
        f"a/b={folder(tmp_path / 'b', {'x': b'3'})}",
    )
    assert images.read("a/b/x").data == b"3"
    assert images.read("a/b/y").data == b"1"


def test_a_missing_image_names_where_it_was_searched(tmp_path, store):
    archive = write_zip(tmp_path / "a.zip", [])
    with pytest.raises(UserError, match=r"image: expected a file in .*a\.zip, got 'x\.png'"):
        store(archive).read("x.png")
    with pytest.raises(
        UserError, match=r"a file in one of --images, which is absent, got 'x\.png'"
    ):
        store().read("x.png")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret"])
def test_names_that_lead_outside_are_refused(tmp_path, store, name):
    (tmp_path / "secret").write_bytes(b"1")
    root = folder(tmp_path / "root", {"a/x": b"1"})
    with pytest.raises(UserError, match="expected one inside of its folder or archive"):
        store(root).read(name)


def test_links_out_of_a_folder_and_pipes_are_refused(tmp_path, store):
    root = folder(tmp_path / "root", {"x": b"1"})
    (tmp_path / "secret").write_bytes(b"1")
    (root / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(root / "pipe")
    images = store(root)
    with pytest.raises(UserError, match=r"without '\.\.' or a link out of it"):
        images.read("link")
    with pytest.raises(UserError, match="expected a regular file, got a device, pipe or socket"):
        images.read("pipe")


def test_a_store_of_another_process_reads_the_same_archive(tmp_path, store):
    images = store(write_zip(tmp_path / "a.zip", [("x.png", image())]))
    assert pickle.loads(pickle.dumps(images)).read("x.png").data == image()


@pytest.mark.parametrize("flag", ["missing", "p=missing", "p=text.txt", "text.txt", "p="])
def test_a_flag_that_names_no_folder_or_archive_is_refused(tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(UserError, match=r"--images: expected PATH or PREFIX=PATH of a folder"):
        parse_images([flag])


def test_a_path_may_contain_an_equals_sign(tmp_path):
    path = tmp_path / "a=b"
    path.mkdir()
    assert parse_images([str(path), f"p={path}"]) == [("", str(path)), ("p", str(path))]


def test_is_below_compares_entire_folder_names():
    assert is_below("sam/images/1.jpg", ("sam",))
    assert is_below("./sam/1.jpg", ("x", "sam"))
    assert not is_below("sam2/1.jpg", ("sam",))
    assert not is_below("x/sam/1.jpg", ("sam",))
    assert not is_below("sam/1.jpg", ())
