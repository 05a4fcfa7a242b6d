"""Bytes of the images of records: files below a folder, or embedded in a record.

A record comes from somebody else. It can name any path and link to any file, so names are confined
to their folder, only regular files are opened, and no more is read than an image can need.
"""

import dataclasses
import os
import stat

from moddistill.errors import UserError, invalid, one_line


@dataclasses.dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file below a folder, by its name in a record.

    Attributes:
      root: folder of the images of a source; may be a link.
      name: relative path, with `/` between its parts.
    """

    root: str
    name: str

    def __str__(self) -> str:
        return f"{one_line(self.root)}/{one_line(self.name)}"


@dataclasses.dataclass(frozen=True, slots=True)
class EmbeddedImage:
    """An image inside of a record, with the name that messages give it."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return one_line(self.name) or "embedded image"


def read_bytes(image: ImageFile | EmbeddedImage, max_bytes: int) -> bytes:
    """Returns the encoded image.

    Raises:
      UserError: the name leads out of its folder, there is no such regular file, it cannot be read,
        or it is larger than `max_bytes`.
    """
    if isinstance(image, EmbeddedImage):
        _check_size(len(image.data), max_bytes, str(image))
        return image.data
    return read_file(confined_path(image), max_bytes, str(image))


def read_file(path: str, max_bytes: int, origin: str) -> bytes:
    """Returns the content of a regular file. `origin` is its name in messages.

    Raises:
      UserError: there is no such regular file, it cannot be read, is empty, or is larger than
        `max_bytes`.
    """
    try:
        with open(path, "rb", opener=_open_without_blocking) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{origin}: expected a regular file, got a device, pipe or socket")
            # Most files of /proc have size 0 too, and some of them block or lose what is read.
            if not status.st_size:
                raise UserError(f"{origin}: expected a readable image, got an empty file")
            _check_size(status.st_size, max_bytes, origin)
            return file.read(status.st_size)  # not to the end: the file may grow
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL, or half of a surrogate pair
        reason = one_line(getattr(error, "strerror", None) or str(error))
        raise UserError(f"{origin}: expected a readable image, got an error: {reason}") from error


def _open_without_blocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for its writer


def _check_size(size: int, max_bytes: int, origin: str) -> None:
    if size > max_bytes:
        expected = f"at most {max_bytes:,} bytes (8 * data.max_pixels + 1 MiB)"
        raise UserError(f"{origin}: expected {expected}, got {size:,}")


def confined_path(image: ImageFile) -> str:
    """Returns the path of a file below its root, after following all links.

    Raises:
      UserError: the name, or a link on its way, leads out of the root.
    """
    expected = f"a file below {one_line(image.root)}, without '..' or a link out of it"
    name = image.name
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise invalid("image", name, expected)
    try:
        path = os.path.realpath(os.path.join(image.root, name))
    except ValueError:  # a NUL, or half of a surrogate pair
        raise invalid("image", name, expected) from None
    if not path.startswith(os.path.join(os.path.realpath(image.root), "")):
        raise invalid("image", name, expected)
    return path
