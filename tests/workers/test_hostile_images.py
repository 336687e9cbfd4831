"""Images that take for ever to decode, crash the decoder or want all memory: each fails alone, soon, with its reason."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storage.images import bounded as bounded_image
from storage.images.bounded import on_image_apart
from storage.images.decoder import Job
from storage.images.decoders import DecoderGoneError, Decoders
from storage.images.decoding import ImageRefusedError, is_quick
from storage.views.report_data import _thumbnail
from tests.support.builders import make_run
from tests.support.clusters import Cluster, finished, table_of
from tests.support.image_work import dies_of, endless, greedy, size_of, stops
from tests.support.processes import command, wait_for, write_csv
from workers.errors import PermanentError, TransientError
from workers.extract.loading import image_header, load_apart, load_image, load_quick

LIMITS = (3136, 12845056)
OPTIONS = {"halp_compat": False, "exif_rotation": False}


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> Decoders:
    """Decoders of the test's own, with nothing remembered."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    own = Decoders(2)
    monkeypatch.setattr(bounded_image, "decoders", own)
    return own


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def progressive(scans: int, side: int = 1000, *, hidden: bool = False) -> bytes:
    """A grey progressive JPEG: each scan says in a few bytes that nothing is in it, and is gone over whole.

    `hidden`: behind a Huffman table that looks as if the image ended there.
    """
    blocks = (-(-side // 8)) ** 2
    table = bytes(7) + b"\x02" + bytes(8)
    data = b"\xff\xd8" + segment(0xDB, b"\0" + b"\x01" * 64)
    data += segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\x01\x11\0")
    data += segment(0xC4, b"\0" + table[:7] + b"\x01" + bytes(8) + b"\0") + segment(0xC4, b"\x10" + table + b"\0\xe0")
    data += segment(0xDA, b"\x01\x01\0\0\0\0") + bytes(blocks)
    if hidden:
        data += segment(0xC4, b"\x01" + table + b"\xff\xd9")
    runs = b"\x01\0\0" * (blocks // 16384 + 1)  # EOB14: 16,384 blocks and more, in a byte and 14 bits
    return data + (segment(0xDA, b"\x01\x01\0\x01\x3f\0") + runs) * scans + b"\xff\xd9"


def encoded(kind: str, size: tuple[int, int] = (96, 64), mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def refused(path: Path) -> PermanentError:
    with pytest.raises(PermanentError) as caught:
        load_image(path, 28, LIMITS)
    assert str(path) in caught.value.message
    return caught.value


# Which are decoded in this process


@pytest.mark.parametrize(
    ("kind", "options", "quick"),
    [
        ("jpeg", {}, True), ("jpeg", {"progressive": True}, True), ("jpeg", {"icc_profile": bytes(60_000)}, False),
        ("png", {}, True), ("webp", {}, True), ("webp", {"lossless": True}, True), ("gif", {}, False),
        ("webp", {"save_all": True, "append_images": [Image.new("RGB", (96, 64))]}, False), ("tiff", {}, False),
        ("webp", {"icc_profile": b"x" * 100}, True), ("jpeg2000", {}, False), ("ico", {}, False),
    ],
)  # fmt: skip
def test_what_surely_ends_is_decoded_here(tmp_path: Path, kind: str, options: dict[str, Any], quick: bool) -> None:
    path = tmp_path / "a"
    path.write_bytes(encoded(kind, **options))
    assert is_quick(path.read_bytes()) is quick
    here, apart = load_quick(path, 28, LIMITS, **OPTIONS), load_apart(path, 28, LIMITS, **OPTIONS)
    assert (here is not None) is quick
    if here is not None:  # the two ways give the same
        assert (here.key, here.sha256, here.original_size) == (apart.key, apart.sha256, apart.original_size)
        np.testing.assert_array_equal(here.pixels, apart.pixels)
    for image in filter(None, (here, apart)):
        assert image.pixels.flags.writeable
        assert image.pixels.flags.c_contiguous
    assert image_header(path)[0] == apart.original_size


def test_a_jpeg_of_parts_of_components_is_not_of_one_scan() -> None:
    """A baseline JPEG may bring each component in a scan of its own, and then any number of them again."""
    data = encoded("jpeg", quality=90)
    scan = data.index(b"\xff\xda")
    assert data[scan + 4] == 3
    parted = data[:scan] + (segment(0xDA, b"\x01\x01\0\0\x3f\0") + b"\x55\x55") * 100 + b"\xff\xd9"
    assert not is_quick(parted)
    assert is_quick(data[:scan] + (segment(0xDA, b"\x01\x01\0\0\x3f\0") + b"\x55\x55") * 3 + b"\xff\xd9")


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8" + segment(0xFE, b"") * 20_000 + encoded("jpeg")[2:],  # many segments
        b"\xff\xd8" + segment(0xE1, b"Exif\0\0" + bytes(60_000)) + encoded("jpeg")[2:],  # EXIF that copies itself
        b"\xff\xd8" + b"\xff" * 100_000 + encoded("jpeg")[2:],  # padding
        encoded("png")[:33] + b"\0\0\0\0tEXt\0\0\0\0" * 30_000,  # chunks
    ],
)
def test_headers_that_cost_much_are_read_apart(data: bytes) -> None:
    assert not is_quick(data)


# Too slow


def test_a_jpeg_of_thousands_of_scans_is_refused_unseen(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(progressive(20_000))
    begun = time.monotonic()
    error = refused(path)
    assert time.monotonic() - begun < 2
    assert error.reason == "image_too_slow"
    assert "is a JPEG of 20,001 scans" in error.message


def test_what_takes_too_long_is_ended_and_remembered(tmp_path: Path, decoders: Decoders) -> None:
    """Half a second of CPU, and some for its pixels, is all that it gets here."""
    path = tmp_path / "a.jpg"
    path.write_bytes(progressive(400_000, 600, hidden=True))
    assert not is_quick(path.read_bytes())
    begun = time.monotonic()
    with pytest.raises(ImageRefusedError) as caught:
        on_image_apart(str(path), size_of, seconds=0.5)
    assert caught.value.reason == "image_too_slow"
    assert "takes too long to decode" in caught.value.what
    assert time.monotonic() - begun < 30
    again = time.monotonic()
    for _ in range(100):  # the image's other questions
        with pytest.raises(ImageRefusedError, match="image_too_slow"):
            on_image_apart(str(path), size_of, seconds=0.5)
    assert time.monotonic() - again < 0.5
    assert decoders._idle == []
    path.write_bytes(encoded("gif"))  # the file is replaced, and the question tried again
    assert on_image_apart(str(path), size_of, seconds=0.5).facts == [96, 64]


@pytest.mark.parametrize("kind", ["gif", "tiff"])
def test_a_decoder_that_dies_costs_its_image_alone(tmp_path: Path, decoders: Decoders, kind: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(encoded(kind))
    for work, arguments, reason, words in [
        (endless, (), "image_too_slow", "too long"),
        (dies_of, (signal.SIGSEGV,), "image_corrupt", "SIGSEGV"),
        (greedy, (), "image_too_large", "6 GB of memory"),
        (stops, (), "image_corrupt", "cannot be decoded"),
    ]:
        with pytest.raises(ImageRefusedError, match=words) as caught:
            on_image_apart(str(path), work, *arguments, seconds=0.3)
        assert caught.value.reason == reason
    with pytest.raises(DecoderGoneError, match="signal 9"):  # by an administrator, or for want of memory
        on_image_apart(str(path), dies_of, signal.SIGKILL)
    assert on_image_apart(str(path), size_of).facts == [96, 64]


def test_a_dead_decoder_is_replaced(tmp_path: Path, decoders: Decoders) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(encoded("gif"))
    on_image_apart(str(path), size_of)
    os.kill(decoders._idle[0].process.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert on_image_apart(str(path), size_of).facts == [96, 64]


def test_the_end_of_the_process_waits_for_no_image(tmp_path: Path, decoders: Decoders) -> None:
    """What runs is broken off after the grace, what waits is not begun: both may be tried elsewhere."""
    path = tmp_path / "a.gif"
    path.write_bytes(encoded("gif"))
    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(on_image_apart, str(path), endless, seconds=60.0 + n) for n in range(6)]
        time.sleep(1)
        begun = time.monotonic()
        decoders.end(0.5)
        errors = [future.exception() for future in futures]
    assert time.monotonic() - begun < 5
    assert {type(error) for error in errors} == {DecoderGoneError}
    assert {str(error) for error in errors} == {
        "was ended, since this process ends", "was not begun, since this process ends",
    }  # fmt: skip


def test_that_is_no_fault_of_the_image(tmp_path: Path, decoders: Decoders) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(encoded("gif"))
    decoders.end(0)
    with pytest.raises(TransientError, match=r"a\.gif: the decoder was not begun"):
        load_image(path, 28, LIMITS)


def test_a_default_timeout_of_sockets_changes_nothing(tmp_path: Path, decoders: Decoders) -> None:
    """Celery sets one when it shuts down."""
    path = tmp_path / "a.tif"
    path.write_bytes(encoded("tiff", (2000, 1500)))
    socket.setdefaulttimeout(0.001)
    try:
        for _ in range(3):
            assert load_image(path, 28, LIMITS).original_size == (2000, 1500)
    finally:
        socket.setdefaulttimeout(None)


def test_no_descriptor_is_left_open(tmp_path: Path, decoders: Decoders) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(encoded("tiff"))
    (tmp_path / "b.gif").write_bytes(b"GIF89a")

    def use() -> None:
        load_image(path, 28, LIMITS)
        image_header(path)[0]
        refused(tmp_path / "b.gif")
        with pytest.raises(ImageRefusedError):
            on_image_apart(str(path), endless, seconds=0.05)

    use()
    decoders._refused.clear()
    gc.collect()  # what tests before left
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        use()
        decoders._refused.clear()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_is_no_witness_against_an_unreadable_file(tmp_path: Path, decoders: Decoders) -> None:
    """What reading raises there comes back as what it is."""
    with pytest.raises(OSError, match="Is a directory") as caught:
        handle = os.open(tmp_path, os.O_RDONLY)
        try:
            decoders.run(handle, Job(size_of, ()))
        finally:
            os.close(handle)
    assert caught.value.errno == errno.EISDIR


def test_no_decoder_outlives_its_parent(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(encoded("gif"))
    code = (
        "import os, sys; from storage.images.bounded import on_image_apart; from workers.extract.loading import _size;"
        f"on_image_apart({str(tmp_path / 'a.gif')!r}, _size, False);"
        "os.system(f'ps -o pid= --ppid {os.getpid()}'); sys.stdout.flush(); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pids = [int(pid) for pid in done.stdout.split()]
    assert pids
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)


# Everywhere


def test_a_thumbnail_is_not_waited_for(tmp_path: Path, images: Path) -> None:
    run = make_run(tmp_path / "run", images_dir=str(images.resolve()))
    good = min(path.name for path in images.iterdir())
    assert _thumbnail(run, good).startswith("data:image/jpeg;base64,")
    (images / "slow.jpg").write_bytes(progressive(20_000))
    os.mkfifo(images / "fifo.png")
    (images / "large.png").symlink_to("/dev/zero")
    for name in ("slow.jpg", "fifo.png", "large.png", "gone.png"):
        assert _thumbnail(run, name) == ""


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (struct.pack(">I4s4s", 24, b"ftyp", b"heic") + bytes(12), "HEIC: convert"),
        (struct.pack(">I4s4s", 24, b"ftyp", b"isom") + bytes(12), "video: take a frame"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html>\n<html>", "HTML page"),
        (b"\xef\xbb\xbf  <html>", "HTML page"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"<Error><Code>AccessDenied</Code></Error>", "XML"),
        (b'{"error": "not found"}', "JSON"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "JPEG XL"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"RIFF\0\0\0\0AVI LIST", "AVI video"),
        (b"Hello, world.\n", "text"),
        (bytes(100), "replace it"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_called_what_it_is(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    error = refused(path)
    assert error.reason == "image_unreadable"
    assert f"{path} is not an image that Pillow can read: " in error.message
    with pytest.raises(PermanentError, match=words):
        image_header(path)[0]


@pytest.mark.slow
def test_a_worker_serves_others_meanwhile_and_ends_when_it_is_asked(cluster: Cluster, images: Path, tmp_path: Path) -> None:
    """More slow images than it has places for: their run waits, another is written, and SIGTERM is not held up by them."""
    cluster.variables["HALP_RUNTIME_DIR"] = str(tmp_path / "runtime")
    slow = progressive(40_000, 9_000, hidden=True)  # minutes
    for number in range(6):
        (images / f"slow{number}.jpg").write_bytes(slow + bytes([number]))
    rows = [{"question_id": f"q{n}", "image_id": f"slow{n}.jpg", "question": "What?", "answer": ""} for n in range(6)]
    assert cluster.enqueue(write_csv(tmp_path / "slow.csv", rows), images, tmp_path / "slow").returncode == 0
    worker = cluster.start("workers", "extract", "--name", "w", HALP_ENGINE="fake:0.01")
    cluster.collector()

    def busy() -> bool:
        checks = json.loads(command("workers", "health", "--json", **cluster.variables).stdout)["checks"]
        return any(check["name"].endswith(" images") and check["healthy"] for check in checks)

    wait_for(busy, 60, "health shows that an image is worked on")
    sound = tmp_path / "sound"
    assert cluster.enqueue(table_of(tmp_path / "sound.csv", 40)[0], images, sound).returncode == 0
    wait_for(lambda: finished(sound), 60, "the other run")
    worker.terminate()
    assert worker.wait(40) == 0
    assert cluster.status(tmp_path / "slow")["outstanding"] == 6
