"""No record reads a file outside of its folder, waits for one, or reads more than an image."""

import os
import re
import signal

import pytest

from moddistill.data import image_files
from moddistill.data.image_files import EmbeddedImage, ImageFile, read_bytes, read_file
from moddistill.errors import UserError

LIMIT = 100


@pytest.fixture
def root(tmp_path):
    """Returns a folder of images next to files that no record may read."""
    (tmp_path / "pics" / "sub").mkdir(parents=True)
    (tmp_path / "pics2").mkdir()
    for name in ("pics/a.png", "pics/sub/b.png", "pics2/secret.png", "secret.png"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path / "pics"


@pytest.fixture
def alarm():
    """Makes waiting for a file an error."""

    def ring(*_):
        raise AssertionError("reading blocks")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def read(root, name):
    return read_bytes(ImageFile(str(root), name), LIMIT)


@pytest.mark.parametrize("name", ["a.png", "./a.png", ".//a.png", "sub/b.png", "sub/./b.png"])
def test_a_file_below_the_root_is_read(root, name):
    assert read(root, name).startswith(b"pics/")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "./",
        "/",
        "//",
        "..",
        "../secret.png",
        "../pics/a.png",
        "sub/../../secret.png",
        "sub/../a.png",
        "../pics2/secret.png",
        "..\\secret.png",
        "sub\\b.png",
        "a.png\0",
        "\0",
        "\ud800.png",
    ],
)
def test_a_name_that_leads_out_of_the_root_is_refused(root, name):
    with pytest.raises(UserError) as error:
        read(root, name)
    assert str(error.value) == (
        f"image: expected a file below {root}, without '..' or a link out of it, got {name!r}"
    )


def test_an_absolute_name_is_refused_even_below_the_root(root):
    for path in (root.parent / "secret.png", root / "a.png"):
        with pytest.raises(UserError, match=r"^image: expected a file below .*, got '/"):
            read(root, str(path))


@pytest.mark.parametrize(
    ("link", "target", "name"),
    [
        ("pics/link.png", "secret.png", "link.png"),
        ("pics/link", ".", "link/secret.png"),
        ("pics/link", "pics2", "link/secret.png"),
        ("pics/link", "pics2/../pics2", "link/secret.png"),
    ],
)
@pytest.mark.parametrize("relative", [False, True])
def test_a_link_out_of_the_root_is_refused(root, link, target, name, relative):
    folder = root.parent
    path = os.path.join("..", target) if relative else folder / target
    (folder / link).symlink_to(path)
    assert (root / name).read_bytes()  # the link works
    with pytest.raises(UserError, match=rf"a link out of it, got '{name}'$"):
        read(root, name)


def test_links_to_links_out_of_the_root_are_refused(root):
    (root / "first").symlink_to("second")
    (root / "second").symlink_to("../pics2")
    with pytest.raises(UserError, match="a link out of it"):
        read(root, "first/secret.png")


def test_links_inside_the_root_and_a_root_that_is_a_link_are_followed(root):
    (root / "link.png").symlink_to("sub/b.png")
    (root / "folder").symlink_to(root / "sub")
    (root.parent / "link").symlink_to("pics")
    for folder in (root, root.parent / "link", f"{root}/", f"{root}/../pics/."):
        assert read(folder, "link.png") == read(folder, "folder/b.png") == b"pics/sub/b.png"


def test_a_relative_root_and_the_root_folder_of_the_system_are_roots(root, monkeypatch):
    monkeypatch.chdir(root)
    assert read(".", "a.png") == read("/", str(root / "a.png")[1:]) == b"pics/a.png"


def test_a_circle_of_links_is_an_error(root):
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    with pytest.raises(UserError, match="/a: expected a readable image, got an error: Too many"):
        read(root, "a")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gone.png", "No such file"),
        ("a.png/b.png", "Not a directory"),
        ("sub", "Is a directory"),
        ("x" * 5000, "File name too long"),
    ],
)
def test_files_that_cannot_be_read_are_errors_of_bounded_length(root, name, reason):
    with pytest.raises(UserError) as error:
        read(root, name)
    pattern = rf"{root}/{name[:90]}.*: expected a readable image, got an error: {reason}.*"
    assert re.fullmatch(pattern, str(error.value))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("path", ["a\0.png", "\ud800.png"])
def test_a_path_that_no_system_accepts_is_an_error(path):
    with pytest.raises(UserError, match=r"^a\.png: expected a readable image, got an error: "):
        read_file(path, LIMIT, "a.png")


def test_an_error_while_reading_is_an_error_of_the_image(root, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(image_files, "_check_size", fail)
    with pytest.raises(UserError, match=r"a\.png: .*, got an error: Input/output error"):
        read(root, "a.png")


@pytest.mark.usefixtures("alarm")
def test_pipes_and_sockets_are_refused_without_waiting_for_them(root):
    os.mkfifo(root / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png: expected a regular file"):
        read(root, "pipe.png")


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/dev/stdin", "/dev/tty"])
def test_devices_are_refused(path):
    with pytest.raises(UserError, match=f"^{path}: expected a re"):
        read_file(path, LIMIT, path)


@pytest.mark.usefixtures("alarm")
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no /proc")
@pytest.mark.parametrize("path", ["/proc/kmsg", "/proc/self/maps", "/proc/self/mem", "/proc/kcore"])
def test_files_of_proc_are_refused_before_they_are_read(path):
    with pytest.raises(UserError, match=f"^{path}: expected "):
        read_file(path, LIMIT, path)


def test_an_empty_file_is_an_error(root):
    (root / "empty.png").touch()
    with pytest.raises(
        UserError, match=r"empty\.png: expected a readable image, got an empty file"
    ):
        read(root, "empty.png")


def test_a_file_is_refused_by_its_size_before_it_is_read(root):
    (root / "limit.png").write_bytes(bytes(LIMIT))
    assert len(read(root, "limit.png")) == LIMIT
    with open(root / "sparse.png", "wb") as file:
        file.truncate(20 * 10**9)
    with pytest.raises(UserError) as error:
        read(root, "sparse.png")
    assert str(error.value) == (
        f"{root}/sparse.png: expected at most 100 bytes (8 * data.max_pixels + 1 MiB), "
        "got 20,000,000,000"
    )


def test_a_file_that_grows_is_read_up_to_the_size_that_was_checked(root, monkeypatch):
    check = image_files._check_size

    def grow(*args):
        check(*args)
        with open(root / "a.png", "ab") as file:
            file.write(bytes(10 * LIMIT))

    monkeypatch.setattr(image_files, "_check_size", grow)
    assert read(root, "a.png") == b"pics/a.png"


def test_embedded_images_have_the_same_size_limit():
    assert read_bytes(EmbeddedImage("a", bytes(LIMIT)), LIMIT) == bytes(LIMIT)
    with pytest.raises(UserError, match=r"^images\[0\]: expected at most 100 bytes .*, got 101$"):
        read_bytes(EmbeddedImage("images[0]", bytes(LIMIT + 1)), LIMIT)


def test_names_in_messages_are_one_line_of_bounded_length(root):
    with pytest.raises(UserError) as error:
        read(root, "a\n\x1b[2J" + "x" * 10**6)
    name = r"a\\n\\x1b\[2J" + "x{90,200}"
    assert re.match(rf"{root}/{name}\.\.\.: expected", str(error.value))
    assert len(str(EmbeddedImage("\n" * 10**6, b""))) <= 200
