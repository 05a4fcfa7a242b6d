import contextlib
from pathlib import Path

import pytest

from moddistill.storage.atomic_dir import _check_free, write_folder, write_shared_folder
from moddistill.storage.digests import NAME


def write(folder, text, command="import", overwrite=True):
    """A folder as a command writes it."""
    with write_folder(folder, command, overwrite) as tmp_dir:
        (tmp_dir / "file").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_two_writers_do_not_share_a_folder(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"expected a new folder, .*, got one that ex"):  # noqa: SIM117
        with write_folder(out, "import", overwrite=False) as slow:
            (slow / "file").write_text("slow")
            write(out, "fast", overwrite=False)
            assert names(slow) == ["file"]
    assert (out / "file").read_text() == "fast"
    assert names(tmp_path) == ["out"]


def test_last_of_two_overwriting_writers_wins(tmp_path):
    out = tmp_path / "out"
    with write_folder(out, "import", overwrite=True) as slow:
        (slow / "file").write_text("slow")
        write(out, "fast")
        assert (out / "file").read_text() == "fast"
    assert (out / "file").read_text() == "slow"
    assert names(tmp_path) == ["out"]


def test_interrupted_replacement_is_undone(tmp_path):
    """The state a process leaves that is killed between its two renames."""
    out, new, old = (
        tmp_path / name for name in ("out", ".out.0123abcd.partial", ".out.0123abcd.old")
    )
    write(out, "before")
    out.rename(old)
    new.mkdir()
    with pytest.raises(ValueError, match="got one that exists"):
        write(out, "after", overwrite=False)
    assert (out / "file").read_text() == "before"
    out.rename(old)
    with pytest.raises(KeyboardInterrupt), write_folder(out, "import", overwrite=True):
        raise KeyboardInterrupt
    assert (out / "file").read_text() == "before"
    assert not old.exists()


@pytest.mark.parametrize("neighbour", [".out.old", ".out.0123abcd.old", ".out.partial"])
def test_hidden_neighbours_are_not_touched(tmp_path, neighbour):
    """Only what a killed command left in pairs is touched."""
    (tmp_path / neighbour).mkdir()
    for text in ("first", "second"):
        write(tmp_path / "out", text)
    assert names(tmp_path) == [neighbour, "out"]


def test_symbolic_link_is_followed(tmp_path):
    place = tmp_path / "disk" / "models"
    write(place, "before")
    (tmp_path / "link").symlink_to(place)
    write(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert (place / "file").read_text() == "after"
    assert names(place.parent) == ["models"]


def test_inputs_are_not_replaced(tmp_path):
    out = tmp_path / "out"
    write(out, "read")
    for source in (out, out / "file"):
        with pytest.raises(ValueError, match=r"without inputs .* contains '.*/out"):  # noqa: SIM117
            with write_folder(out, "import", overwrite=True, inputs=[source]):
                pass
    assert (out / "file").read_text() == "read"


def thesis(folder):
    folder.mkdir()
    (folder / "chapter.tex").write_text("years of work")
    return "without digests.json"


def workdir(folder):
    thesis(folder)
    write(folder / "model", "a result", command="train")
    return "without digests.json"


def parent_of_outputs(folder):
    write(folder / "one", "imported")
    return "without digests.json"


def output_with_a_note(folder):
    write(folder, "imported")
    (folder / "note.txt").write_text("mine")
    return "note.txt is not in digests.json"


def output_with_a_link(folder):
    write(folder, "imported")
    (folder / "link").symlink_to(folder.parent)
    return "link is not in digests.json"


def edited_output(folder):
    write(folder, "imported")
    (folder / "file").write_text("improved by hand")
    return "file does not match digests.json"


def output_with_a_file_removed(folder):
    write(folder, "imported")
    (folder / "file").unlink()
    return "file is missing"


def output_of_another_command(folder):
    write(folder, "trained for a week", command="train")
    return "that train wrote"


def file(folder):
    folder.write_text("no folder")
    return "that exists"


@pytest.mark.parametrize(
    "make",
    [
        thesis,
        workdir,
        parent_of_outputs,
        output_with_a_note,
        output_with_a_link,
        edited_output,
        output_with_a_file_removed,
        output_of_another_command,
        file,
    ],
)
@pytest.mark.parametrize("linked", [False, True])
def test_overwrite_refuses_folders_that_the_command_did_not_write(tmp_path, make, linked):
    message = make(tmp_path / "out")
    target = tmp_path / "out"
    if linked:
        target = tmp_path / "link"
        target.symlink_to(tmp_path / "out")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(
        ValueError, match=f"/out'?: expected a new folder, or --overwrite.*, got .*{message}"
    ):
        write(target, "exported")
    assert before == {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("folder", [".", ".."])
def test_overwrite_of_the_working_directory_or_a_parent_is_refused(tmp_path, folder):
    """Even if the command wrote it, since the shell would be left in a folder that is gone."""
    with write_folder(tmp_path / "out", "import", overwrite=False) as tmp_dir:
        (tmp_dir / "below").mkdir()
        (tmp_dir / "file").touch()
    inside = tmp_path / "out" / "below" if folder == ".." else tmp_path / "out"
    message = "/out': expected a new .*, got one that contains the working directory"
    with contextlib.chdir(inside), pytest.raises(ValueError, match=message):
        write(Path(folder), "after")
    assert names(tmp_path / "out") == ["below", NAME, "file"]


def test_overwrite_of_the_home_directory_or_a_parent_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "home", "before")
    for home in (tmp_path / "home", tmp_path / "home" / "me"):
        monkeypatch.setenv("HOME", str(home))
        with pytest.raises(
            ValueError, match=r"/home': expected a new .* that contains the home dir"
        ):
            write(tmp_path / "home", "after")
    assert (tmp_path / "home" / "file").read_text() == "before"


def test_overwrite_of_the_root_directory_is_refused():
    """Only the check is called: nothing is written if it fails."""
    with pytest.raises(ValueError, match=r"'/': expected a new .* that contains the working dir"):
        _check_free(Path("/"), "import", overwrite=True)


def test_folder_that_changes_during_a_write_is_not_replaced(tmp_path):
    write(tmp_path / "out", "before")
    with pytest.raises(ValueError, match=r"note\.txt is not in digests\.json"):  # noqa: SIM117
        with write_folder(tmp_path / "out", "import", overwrite=True):
            (tmp_path / "out" / "note.txt").write_text("mine")
    assert names(tmp_path / "out") == [NAME, "file", "note.txt"]
    assert names(tmp_path) == ["out"]


def test_shared_folder_of_a_stage_is_replaced_only_by_a_stage(tmp_path):
    (tmp_path / ".model.0123abcd.partial").mkdir()  # of a run that was killed
    for text in ("first", "second"):
        with write_shared_folder(tmp_path / "model", "train") as tmp_dir:
            (tmp_dir / "file").write_text(text)
    assert (tmp_path / "model" / "file").read_text() == "second"
    (tmp_path / "model" / "file").write_text("edited")
    write(tmp_path / "imported", "imported")
    for name in ("model", "imported"):
        with pytest.raises(ValueError, match=f"/{name}'?: expected .*remove or rename this one"):  # noqa: SIM117
            with write_shared_folder(tmp_path / name, "train"):
                pass
    assert names(tmp_path) == ["imported", "model"]
