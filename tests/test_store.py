"""The contract of the store. Results are read back with plain file operations, not through the store itself."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from storage import store as store_module
from storage.store import DirectoryStore

PROCESSES, ROUNDS = 6, 40


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def store(root) -> DirectoryStore:
    return DirectoryStore(root, ".scratch")


def files(root: Path) -> dict[str, bytes]:
    """Return everything below the root, unfinished files included."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refuse_links(monkeypatch, code: int) -> None:
    def link(source, target):
        raise OSError(code, os.strerror(code), source, None, target)

    monkeypatch.setattr(os, "link", link)


# Creating


def test_put_new_creates_the_object_and_its_directories(store, root):
    assert store.put_new("a/b/c.json", b"one") is True
    assert files(root) == {"a/b/c.json": b"one"}


def test_put_new_never_replaces(store, root):
    store.put_new("key", b"one")
    before = (root / "key").stat()
    assert store.put_new("key", b"two") is False
    after = (root / "key").stat()
    assert files(root) == {"key": b"one"}
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_an_object_may_be_empty_and_binary(store, root):
    store.put_new("empty", b"")
    store.put_new("binary", bytes(range(256)))
    assert files(root) == {"empty": b"", "binary": bytes(range(256))}


def test_put_creates_and_replaces(store, root):
    store.put("a/key", b"one")
    assert files(root) == {"a/key": b"one"}
    store.put("a/key", b"two")
    assert files(root) == {"a/key": b"two"}


def test_put_leaves_the_old_object_where_it_fails(store, root, monkeypatch):
    store.put("key", b"one")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        store.put("key", b"two")
    assert files(root) == {"key": b"one"}


def test_content_is_flushed_before_it_has_a_name(store, root, monkeypatch):
    order = []
    link, fsync = os.link, os.fsync

    def noted_fsync(descriptor):
        order.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def noted_link(source, target):
        order.append("link")
        link(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "link", noted_link)
    store.put_new("a/key", b"one")
    [content, then, directory] = order
    assert content.endswith(".partial")
    assert (then, directory) == ("link", str(root / "a"))


# Reading


def test_get_and_exists(store, root):
    root.mkdir()
    (root / "key").write_bytes(b"one")
    assert store.get("key") == b"one"
    assert store.exists("key")
    assert not store.exists("other")
    with pytest.raises(FileNotFoundError):
        store.get("other")
    with pytest.raises(FileNotFoundError):
        store.get("no/directory")


def test_list_is_sorted_and_one_level_deep(store):
    for key in ("d/10", "d/9", "d/b/deep", "d/a", "e"):
        store.put_new(key, b"")
    assert store.list("d") == ["10", "9", "a", "b"]


def test_list_of_nothing_is_empty(store):
    assert store.list("nowhere") == []
    store.put_new("key", b"")
    assert store.list("key") == []
    assert store.list("key/below") == []


# Removing


def test_delete(store, root):
    store.put_new("key", b"one")
    store.delete("key")
    store.delete("key")
    store.delete("no/directory")
    assert files(root) == {}
    assert store.put_new("key", b"two") is True


def test_delete_directory(store, root):
    for key in ("d/a", "d/b", "e/a"):
        store.put_new(key, b"")
    store.delete_directory("d")
    store.delete_directory("d")
    assert not (root / "d").exists()
    assert files(root) == {"e/a": b""}


def test_delete_directory_leaves_what_came_late(store, root, monkeypatch):
    store.put_new("d/a", b"")
    delete = store.delete

    def delete_while_another_writes(key):
        delete(key)
        (root / "d" / "late").write_bytes(b"")

    monkeypatch.setattr(store, "delete", delete_while_another_writes)
    store.delete_directory("d")
    assert files(root) == {"d/late": b""}


# Unfinished content


def test_partial_is_a_new_path_each_time_and_is_removed(store, root):
    with store.partial() as one, store.partial() as two:
        assert one != two
        assert not one.exists()
        assert one.parent == root / ".scratch"
        one.write_bytes(b"half")
    assert files(root) == {}


def test_partial_is_removed_after_an_error(store, root):
    with pytest.raises(RuntimeError), store.partial() as path:
        path.write_bytes(b"half")
        raise RuntimeError
    assert files(root) == {}


def test_publish_gives_the_whole_file_a_name_once(store, root):
    with store.partial() as path:
        path.write_bytes(b"one")
        assert not (root / "a" / "part.h5").exists()
        assert store.publish(path, "a/part.h5") is True
    with store.partial() as path:
        path.write_bytes(b"two")
        assert store.publish(path, "a/part.h5") is False
    assert files(root) == {"a/part.h5": b"one"}


def test_delete_partials_removes_only_old_ones(store, root):
    store.put_new("key.partial", b"an object")
    for name, age in (("old.partial", 100), ("new.partial", 0), ("other", 100)):
        path = root / ".scratch" / name
        path.write_bytes(b"")
        os.utime(path, (time.time() - age,) * 2)
    store.delete_partials(older_than=50)
    assert set(files(root)) == {"key.partial", ".scratch/new.partial", ".scratch/other"}


def test_a_clock_that_is_ahead_deletes_no_partial_that_is_being_written(store, root, monkeypatch):
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 3600)
    with store.partial() as path:
        path.write_bytes(b"half")
        store.delete_partials(older_than=50)
        assert path.exists()


def test_delete_partials_of_a_new_store(store):
    store.delete_partials(older_than=0)


# File systems of other kinds


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_without_hard_links_an_object_is_still_created_once(store, root, monkeypatch, code):
    refuse_links(monkeypatch, code)
    assert store.put_new("a/key", b"one") is True
    assert store.put_new("a/key", b"two") is False
    assert files(root) == {"a/key": b"one"}


def test_without_hard_links_publish_leaves_no_partial(store, root, monkeypatch):
    refuse_links(monkeypatch, errno.EPERM)
    for content, created in ((b"one", True), (b"two", False)):
        with store.partial() as path:
            path.write_bytes(content)
            assert store.publish(path, "part.h5") is created
    assert files(root) == {"part.h5": b"one"}


def test_another_error_of_link_is_not_hidden(store, root, monkeypatch):
    refuse_links(monkeypatch, errno.ENOSPC)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        store.put_new("key", b"one")
    assert files(root) == {}


def test_another_error_of_renameat2_names_the_target(store, root, monkeypatch):
    refuse_links(monkeypatch, errno.EPERM)
    with store.partial() as path, pytest.raises(FileNotFoundError, match=r"part\.h5"):
        store.publish(path, "part.h5")  # nothing was written to it
    assert files(root) == {}


def test_a_link_that_nfs_reports_as_existing_though_it_made_it(store, root, monkeypatch):
    link = os.link

    def retried_link(source, target):
        link(source, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))

    monkeypatch.setattr(os, "link", retried_link)
    assert store.put_new("key", b"one") is True
    assert files(root) == {"key": b"one"}


# Many processes


def put_in_rounds(root: Path, number: int, hard_links: bool, barrier, won) -> None:
    if not hard_links:
        refuse_links(pytest.MonkeyPatch(), errno.EPERM)
    store = DirectoryStore(root, ".scratch")
    for round_ in range(ROUNDS):
        barrier.wait(60)
        if store.put_new(f"{round_ % 7}/{round_}", str(number).encode() * 1000):
            won.put((round_, number))


@pytest.mark.parametrize("hard_links", [True, False])
def test_of_many_processes_exactly_one_creates_an_object(root, hard_links):
    context = multiprocessing.get_context("spawn")
    barrier, won = context.Barrier(PROCESSES), context.SimpleQueue()
    processes = [
        context.Process(target=put_in_rounds, args=(root, number, hard_links, barrier, won))
        for number in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    winners = {}
    for _ in range(ROUNDS):
        round_, number = won.get()
        assert round_ not in winners
        winners[round_] = number
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert won.empty()
    assert files(root) == {f"{r % 7}/{r}": str(number).encode() * 1000 for r, number in winners.items()}


def test_a_reader_never_sees_half_an_object(store, root):
    """`put` replaces in one step: every read during many replacements is one whole content."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    store.put("key", b"0" * 100_000)
    writer = context.Process(target=replace_until, args=(root, stop))
    writer.start()
    try:
        seen = set()
        deadline = time.monotonic() + 60
        while len(seen) < 5 and time.monotonic() < deadline:
            content = (root / "key").read_bytes()
            assert len(content) == 100_000
            assert len(set(content)) == 1
            seen.add(content[0])
    finally:
        stop.set()
        writer.join(60)
    assert len(seen) == 5


def replace_until(root: Path, stop) -> None:
    store = DirectoryStore(root, ".scratch")
    number = 0
    while not stop.is_set():
        number += 1
        store.put("key", str(number % 10).encode() * 100_000)


def test_libc_has_renameat2():
    assert store_module._libc.renameat2
