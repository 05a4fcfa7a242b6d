import pytest

from moddistill.new_folder import new_folder


def fill(folder, text):
    (folder / "file").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_two_writers_do_not_share_a_folder(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="exists; accepted: a new folder"):  # noqa: SIM117
        with new_folder(out, overwrite=False) as slow:
            fill(slow, "slow")
            with new_folder(out, overwrite=False) as fast:
                assert names(slow) == ["file"]
                fill(fast, "fast")
    assert (out / "file").read_text() == "fast"
    assert names(tmp_path) == ["out"]


def test_the_last_of_two_that_overwrite_stays(tmp_path):
    out = tmp_path / "out"
    with new_folder(out, overwrite=True) as slow:
        fill(slow, "slow")
        with new_folder(out, overwrite=True) as fast:
            fill(fast, "fast")
        assert (out / "file").read_text() == "fast"
    assert (out / "file").read_text() == "slow"
    assert names(tmp_path) == ["out"]


def test_half_an_exchange_is_undone(tmp_path):
    """The state a process leaves that is killed between its two renames."""
    old = tmp_path / ".out.old"
    old.mkdir()
    fill(old, "before")
    with pytest.raises(ValueError, match="exists; accepted"):  # noqa: SIM117
        with new_folder(tmp_path / "out", overwrite=False):
            pass
    assert (tmp_path / "out" / "file").read_text() == "before"
    (tmp_path / "out").rename(old)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", overwrite=True):
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "file").read_text() == "before"
    assert names(tmp_path) == ["out"]


def test_link_is_followed(tmp_path):
    place = tmp_path / "disk" / "models"
    place.mkdir(parents=True)
    fill(place, "before")
    (tmp_path / "link").symlink_to(place)
    with new_folder(tmp_path / "link", overwrite=True) as aside:
        fill(aside, "after")
    assert (tmp_path / "link").is_symlink()
    assert (place / "file").read_text() == "after"
    assert names(place.parent) == ["models"]


def test_what_is_read_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "read")
    for source in (out, out / "file"):
        with pytest.raises(ValueError, match="which is being read"):  # noqa: SIM117
            with new_folder(out, overwrite=True, keep=[source]):
                pass
    assert names(out) == ["file"]
