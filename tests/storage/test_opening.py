"""Files of strangers: regular ones alone, never through a link that came since the look, never more than a bound."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from storage.images import opening
from storage.images.lookup import OutsideRootError, resolve_image
from storage.images.opening import LinkError, NotRegularError, open_regular, read_bounded
from workers.errors import PermanentError, TransientError
from workers.extract.loading import image_header, load_image

LIMITS = (3136, 12845056)


@pytest.fixture(params=["openat2", "step by step"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of opening; the second is that of a kernel that does not know the call."""
    if request.param == "step by step":
        monkeypatch.setattr(opening, "_SYS_OPENAT2", 100_000)
    return str(request.param)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a file in a subdirectory; beside it another one with a secret."""
    for name, content in (("images/sub/a", b"mine"), ("other/a", b"secret")):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path.resolve()


def content(path: Path, limit: int = 1000) -> bytes:
    descriptor = open_regular(str(path))
    try:
        return read_bounded(descriptor, limit)
    finally:
        os.close(descriptor)


def test_a_regular_file_is_opened(place: Path, way: str) -> None:
    assert content(place / "images/sub/a") == b"mine"
    descriptor = open_regular(str(place / "images/sub/a"))
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)


@pytest.mark.parametrize("link", ["images/sub/a", "images/sub", "images"])
def test_what_became_a_link_since_the_look_opens_nothing(place: Path, way: str, link: str) -> None:
    location = resolve_image("sub/a", place / "images", ())
    (place / link).rename(place / "away")
    (place / link).symlink_to(place / "other" / ("a" if link.endswith("a") else ""))
    (place / "other/sub").mkdir()
    (place / "other/sub/a").write_bytes(b"secret")
    with pytest.raises(LinkError):
        open_regular(location)
    with pytest.raises(TransientError, match="link is in the way"):  # the next attempt looks again
        load_image(location, 28, LIMITS)


def test_a_directory_that_is_swapped_all_the_time_gives_nothing_from_outside(place: Path, way: str) -> None:
    """What is opened by the path that was looked at is the file that lay there, or nothing."""
    images, ended = place / "images", threading.Event()
    (place / "link").symlink_to(place / "other")

    def swap() -> None:
        while not ended.is_set():
            os.rename(images / "sub", place / "aside")
            os.rename(place / "link", images / "sub")
            os.rename(images / "sub", place / "link")
            os.rename(place / "aside", images / "sub")

    thread = threading.Thread(target=swap)
    thread.start()
    found = {"mine": 0, "nothing": 0}
    try:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            try:
                assert content(Path(resolve_image("sub/a", images, ()))) == b"mine"
                found["mine"] += 1
            except (OutsideRootError, LinkError, FileNotFoundError):
                found["nothing"] += 1
    finally:
        ended.set()
        thread.join()
    assert min(found.values()) > 0


def test_a_link_that_was_gone_again_opens_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step found a link; by the look at what it is, the directory lay there again."""
    monkeypatch.setattr(opening, "_SYS_OPENAT2", 100_000)
    honest = os.open

    def swapped(name: str, flags: int, *, dir_fd: int | None = None) -> int:
        if name == "sub":
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name)
        return honest(name, flags, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(LinkError):
        open_regular(str(place / "images/sub/a"))


def test_missing_and_forbidden_are_what_they_were(place: Path, way: str) -> None:
    for name, error in (("gone", FileNotFoundError), ("sub", IsADirectoryError), ("sub/a/b", NotADirectoryError)):
        with pytest.raises(error):
            open_regular(str(place / "images" / name))
    with pytest.raises(OSError, match="too long") as caught:
        open_regular(str(place / ("n" * 300)))
    assert caught.value.errno == errno.ENAMETOOLONG


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket has 107 characters at most
        try:
            bound.bind(path.name)
        finally:
            os.chdir(here)


@pytest.mark.parametrize(("make", "kind"), [(fifo, "a FIFO"), (unix_socket, "a socket")])
def test_what_is_no_file_fails_at_once(place: Path, way: str, make: Callable[[Path], None], kind: str) -> None:
    make(place / "images/x.png")
    with pytest.raises(NotRegularError):
        open_regular(str(place / "images/x.png"))
    for look in (lambda path: load_image(path, 28, LIMITS), image_header):
        with pytest.raises(PermanentError, match=rf"x\.png is {kind}, not a file") as caught:
            look(str(place / "images/x.png"))
        assert caught.value.reason == "image_unreadable"


def test_a_device_is_no_file(way: str) -> None:
    for path in ("/dev/zero", "/dev/null"):
        with pytest.raises(NotRegularError, match="a device"):
            open_regular(path)


def test_what_grows_or_lies_about_its_size_is_bounded(place: Path) -> None:
    assert content(Path(f"/proc/{os.getpid()}/status"), 10**6).startswith(b"Name:")  # its size is 0
    with pytest.raises(OSError, match="more than 10 bytes") as caught:
        content(Path(f"/proc/{os.getpid()}/status"), 10)
    assert caught.value.errno == errno.EFBIG
    path = place / "large"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(OSError, match="more than 1,000 bytes"):
        content(path)
    assert content(place / "images/sub/a", 4) == b"mine"
    with pytest.raises(OSError, match="more than 3 bytes"):
        content(place / "images/sub/a", 3)


def test_a_file_that_grows_while_it_is_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place / "images/sub/a"
    read = os.read

    def grow(descriptor: int, length: int) -> bytes:
        with path.open("ab") as file:
            file.write(b"more")
        return read(descriptor, length)

    monkeypatch.setattr(opening.os, "read", grow)
    with pytest.raises(OSError, match="more than 20 bytes"):
        content(path, 20)


def test_links_within_the_roots_go_on_working(place: Path, way: str) -> None:
    Image.new("RGB", (56, 56)).save(place / "other/c.png")
    (place / "images/c.png").symlink_to("../other/c.png")
    (place / "images/way").symlink_to(place / "other")
    for name in ("c.png", "way/c.png"):
        location = resolve_image(name, place / "images", (place / "other",))
        assert load_image(location, 28, LIMITS).original_size == image_header(location)[0] == (56, 56)
        with pytest.raises(OutsideRootError):
            resolve_image(name, place / "images", ())
