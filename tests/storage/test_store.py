"""The contract of the stores, and what is special about each. Results are read back past the store: plain files, plain HTTP."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from obstore.exceptions import GenericError, PermissionDeniedError, UnauthenticatedError

from storage.errors import ObjectStoreError
from storage.stores import handles, object_client
from storage.stores.object_client import connect
from storage.stores.object_store import ObjectStore
from storage.stores.space import describe
from storage.stores.store import DirectoryStore, Store, local_file, open_store
from tests.support.s3_server import CREDENTIALS

PROCESSES, ROUNDS = 6, 40


class StoreContract:
    """What every store does. A subclass says where (`location`), and reads and writes it without the store."""

    @pytest.fixture
    def store(self, location: str) -> Store:
        return open_store(location, ".scratch")

    def files(self, location: str) -> dict[str, bytes]:
        """Return everything below the location, unfinished files included."""
        raise NotImplementedError

    def read(self, location: str, key: str) -> bytes:
        raise NotImplementedError

    def write(self, location: str, key: str, data: bytes) -> None:
        raise NotImplementedError

    # Creating

    def test_put_new_creates_the_object_and_its_directories(self, store, location):
        assert store.put_new("a/b/c.json", b"one") is True
        assert self.files(location) == {"a/b/c.json": b"one"}

    def test_put_new_never_replaces(self, store, location):
        store.put_new("key", b"one")
        assert store.put_new("key", b"two") is False
        assert store.put_new("key", b"one") is False
        assert self.files(location) == {"key": b"one"}

    def test_an_object_may_be_empty_and_binary(self, store, location):
        store.put_new("empty", b"")
        store.put_new("binary", bytes(range(256)))
        assert self.files(location) == {"empty": b"", "binary": bytes(range(256))}

    def test_put_creates_and_replaces(self, store, location):
        store.put("a/key", b"one")
        assert self.files(location) == {"a/key": b"one"}
        store.put("a/key", b"two")
        assert self.files(location) == {"a/key": b"two"}

    # Reading

    def test_get_and_exists(self, store, location):
        self.write(location, "key", b"one")
        assert store.get("key") == b"one"
        assert store.exists("key")
        assert not store.exists("other")
        for key in ("other", "no/directory"):
            with pytest.raises(FileNotFoundError):
                store.get(key)

    def test_get_range(self, store, location):
        self.write(location, "key", b"0123456789")
        assert store.get_range("key", 2, 3) == b"234"
        assert store.get_range("key", 8, 30) == b"89"
        with pytest.raises(FileNotFoundError):
            store.get_range("other", 0, 1)

    def test_get_many_keeps_the_order(self, store, location):
        for number in range(40):
            self.write(location, f"d/{number}", str(number).encode())
        keys = [f"d/{number}" for number in reversed(range(40))]
        assert list(store.get_many(keys)) == [str(number).encode() for number in reversed(range(40))]
        assert list(store.get_many([])) == []
        with pytest.raises(FileNotFoundError):
            list(store.get_many([*keys, "d/40", *keys]))

    def test_local_copy(self, store, location):
        self.write(location, "a/part.h5", b"one")
        with store.local_copy("a/part.h5") as path:
            assert (path.name, path.read_bytes()) == ("part.h5", b"one")
        with pytest.raises(FileNotFoundError), store.local_copy("a/other.h5"):
            pass
        with local_file(store.address("a/part.h5")) as path:
            assert path.read_bytes() == b"one"

    def test_list_is_sorted_and_one_level_deep(self, store, location):
        for key in ("d/10", "d/9", "d/b/deep", "d/a", "e"):
            self.write(location, key, b"")
        assert store.list("d") == ["10", "9", "a", "b"]
        assert store.list("") == ["d", "e"]
        assert (store.directories("d"), store.directories("")) == (["b"], ["d"])

    def test_list_of_more_than_one_page(self, store, location):
        for number in range(1005):
            self.write(location, f"d/{number:04d}", b"")
        assert store.list("d") == [f"{number:04d}" for number in range(1005)]
        store.delete_directory("d")
        assert self.files(location) == {}

    def test_list_of_nothing_is_empty(self, store):
        assert (store.list("nowhere"), store.directories("nowhere"), store.list("")) == ([], [], [])
        store.put_new("key", b"")
        assert store.list("key") == []
        assert store.list("key/below") == []

    # Removing

    def test_delete(self, store, location):
        store.put_new("key", b"one")
        store.delete("key")
        store.delete("key")
        store.delete("no/directory")
        assert self.files(location) == {}
        assert store.put_new("key", b"two") is True

    def test_delete_directory(self, store, location):
        for key in ("d/a", "d/b", "e/a"):
            store.put_new(key, b"")
        store.delete_directory("d")
        store.delete_directory("d")
        assert "d" not in store.list("")
        assert self.files(location) == {"e/a": b""}

    def test_move(self, store, location):
        self.write(location, "key", b"one")
        store.move("key", "aside/key")
        store.move("key", "aside/key")
        assert self.files(location) == {"aside/key": b"one"}

    # Unfinished content

    def test_partial_is_a_new_path_each_time_and_is_removed(self, store, location):
        with store.partial() as one, store.partial() as two:
            assert one != two
            assert not one.exists()
            one.write_bytes(b"half")
        assert not one.exists()
        assert self.files(location) == {}

    def test_partial_is_removed_after_an_error(self, store, location):
        with pytest.raises(RuntimeError), store.partial() as path:
            path.write_bytes(b"half")
            raise RuntimeError
        assert not path.exists()
        assert self.files(location) == {}

    def test_publish_gives_the_whole_file_a_name_once(self, store, location):
        with store.partial() as path:
            path.write_bytes(b"one")
            assert not store.exists("a/part.h5")
            assert store.publish(path, "a/part.h5") is True
        with store.partial() as path:
            path.write_bytes(b"two")
            assert store.publish(path, "a/part.h5") is False
        assert self.files(location) == {"a/part.h5": b"one"}

    def test_delete_partials_of_a_new_store(self, store):
        store.delete_partials(older_than=0)

    # Many processes

    def test_of_many_processes_exactly_one_creates_an_object(self, location):
        won = race(location, hard_links=True)
        assert self.files(location) == won

    def test_a_reader_never_sees_half_an_object(self, store, location):
        """`put` replaces in one step: every read during many replacements is one whole content."""
        context = multiprocessing.get_context("spawn")
        stop = context.Event()
        store.put("key", b"0" * 100_000)
        writer = context.Process(target=replace_until, args=(location, stop))
        writer.start()
        try:
            seen = set()
            deadline = time.monotonic() + 60
            while len(seen) < 5 and time.monotonic() < deadline:
                content = self.read(location, "key")
                assert len(content) == 100_000
                assert len(set(content)) == 1
                seen.add(content[0])
        finally:
            stop.set()
            writer.join(60)
        assert len(seen) == 5


def race(location: str, hard_links: bool) -> dict[str, bytes]:
    """Have many processes create the same objects at once; return what each winner says it created."""
    context = multiprocessing.get_context("spawn")
    barrier, won = context.Barrier(PROCESSES), context.SimpleQueue()
    processes = [
        context.Process(target=put_in_rounds, args=(location, number, hard_links, barrier, won)) for number in range(PROCESSES)
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
    return {f"{r % 7}/{r}": str(number).encode() * 1000 for r, number in winners.items()}


def put_in_rounds(location: str, number: int, hard_links: bool, barrier, won) -> None:
    if not hard_links:
        refuse_links(pytest.MonkeyPatch(), errno.EPERM)
    store = open_store(location, ".scratch")
    for round_ in range(ROUNDS):
        barrier.wait(60)
        if store.put_new(f"{round_ % 7}/{round_}", str(number).encode() * 1000):
            won.put((round_, number))


def replace_until(location: str, stop) -> None:
    store = open_store(location, ".scratch")
    number = 0
    while not stop.is_set():
        number += 1
        store.put("key", str(number % 10).encode() * 100_000)


class TestDirectoryStore(StoreContract):
    @pytest.fixture
    def location(self, tmp_path: Path) -> str:
        (tmp_path / "root").mkdir()
        return str(tmp_path / "root")

    def files(self, location: str) -> dict[str, bytes]:
        return files(Path(location))

    def read(self, location: str, key: str) -> bytes:
        return (Path(location) / key).read_bytes()

    def write(self, location: str, key: str, data: bytes) -> None:
        path = Path(location) / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


class TestObjectStore(StoreContract):
    @pytest.fixture
    def location(self, s3_url: str, s3_server) -> str:
        self.server = s3_server
        return s3_url

    def files(self, location: str) -> dict[str, bytes]:
        return self.server.objects(location)

    def read(self, location: str, key: str) -> bytes:
        return self.server.read(f"{location}/{key}")

    def write(self, location: str, key: str, data: bytes) -> None:
        self.server.write(f"{location}/{key}", data)


# In an object store


def test_a_put_whose_answer_is_lost_is_known_as_our_own(s3_url, s3_server):
    """obstore sends it again and is told that the object exists. A plan taken for another's would be deleted."""
    store = open_store(s3_url)
    s3_server.control(lose=1)
    assert store.put_new("key", b"one") is True
    assert s3_server.control()["PUT"] == 2
    s3_server.control(lose=1)
    assert store.put_new("key", b"one") is False
    assert s3_server.objects(s3_url) == {"key": b"one"}


def test_each_error_is_one_sentence_without_what_signed_the_request(s3_url, s3_server):
    store = open_store(s3_url)
    s3_server.control(deny="PUT")
    with pytest.raises(ObjectStoreError) as caught:
        store.put_new("key", b"one")
    assert str(caught.value) == (
        f"{s3_url}/key: access denied (AccessDenied): check the AWS_* credentials, and that they may read, list, write and"
        " delete there"
    )
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    for ask in (lambda s: s.get("key"), lambda s: s.list("")):
        with pytest.raises(ObjectStoreError, match="there is no bucket s3://nobucket: create it, or see AWS_ENDPOINT_URL"):
            ask(open_store("s3://nobucket/run"))
    with pytest.raises(ObjectStoreError, match="Could not parse path"):
        store.get("a//b")


def test_a_server_that_is_away_is_tried_for_a_while(s3_url, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(object_client, "_RETRY_SECONDS", 1)
    connect.cache_clear()
    with pytest.raises(OSError, match=f"{s3_url}/key: no answer: check the network and AWS_ENDPOINT_URL"):
        open_store(s3_url).get("key")
    connect.cache_clear()


def test_a_lack_of_credentials_is_named(s3_url, monkeypatch):
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(object_client, "_RETRY_SECONDS", 1)
    connect.cache_clear()
    with pytest.raises(ObjectStoreError, match=f"{s3_url}/key: no credentials: set AWS_ACCESS_KEY_ID"):
        open_store(s3_url).get("key")
    connect.cache_clear()


@pytest.mark.parametrize(("scheme", "variables"), [("s3", "AWS_*"), ("gs", "GOOGLE_*"), ("az", "AZURE_STORAGE_*")])
def test_messages_name_the_variables_of_the_store(scheme, variables):
    for error in (PermissionDeniedError("403 Forbidden"), UnauthenticatedError("401 Unauthorized")):
        assert f"check the {variables} credentials" in str(object_client.translate(error, "url", f"{scheme}://b"))
    other = str(object_client.translate(GenericError("Account must be specified"), "url", f"{scheme}://b"))
    assert other.startswith("url: Account must be specified")
    assert (f"{variables} variables say which store it is, and {scheme}:// is untested" in other) == (scheme != "s3")


def test_objects_are_asked_for_one_by_one_where_they_are_few(s3_url, s3_server):
    store = ObjectStore(s3_url)
    for number in range(120):
        s3_server.write(f"{s3_url}/d/{number}", b"")
    s3_server.control()
    assert store.missing({"d/1", "d/x"}) == {"d/x"}
    assert s3_server.control() == {"HEAD": 2}
    assert store.missing({f"d/{number}" for number in range(115, 300)}) == {f"d/{number}" for number in range(120, 300)}
    assert s3_server.control() == {"LIST": 1}


def test_a_large_object_is_not_fetched(s3_url, s3_server):
    s3_server.write(f"{s3_url}/key", b"0123456789")
    assert ObjectStore(s3_url).get_bounded("key", 10) == b"0123456789"
    assert ObjectStore(s3_url).get_bounded("key", 9) is None


def test_delete_partials_of_an_object_store_removes_only_old_ones(s3_url, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = open_store(s3_url)
    for name, age in (("halp-partial-old", 100), ("halp-partial-new", 0), ("other", 100)):
        (tmp_path / name).mkdir()
        for path in (tmp_path / name / "object", tmp_path / name):
            path.touch()
            os.utime(path, (time.time() - age,) * 2)
    store.delete_partials(older_than=50)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["halp-partial-new", "other"]


# In a directory


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
    def link(source, target, **_):
        raise OSError(code, os.strerror(code), source, None, target)

    monkeypatch.setattr(os, "link", link)


def test_put_new_does_not_touch_what_exists(store, root):
    store.put_new("key", b"one")
    before = (root / "key").stat()
    assert store.put_new("key", b"two") is False
    after = (root / "key").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_put_leaves_the_old_object_where_it_fails(store, root, monkeypatch):
    store.put("key", b"one")
    monkeypatch.setattr(os, "replace", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        store.put("key", b"two")
    assert files(root) == {"key": b"one"}


def test_content_is_flushed_before_it_has_a_name(store, root, monkeypatch):
    order = []
    link, fsync = os.link, os.fsync

    def noted_fsync(descriptor):
        order.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def noted_link(source, target, **handles):
        order.append("link")
        link(source, target, **handles)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "link", noted_link)
    store.put_new("a/key", b"one")
    [content, then, directory] = order
    assert content.endswith(".partial")
    assert (then, directory) == ("link", str(root / "a"))


def test_delete_directory_leaves_what_came_late(store, root, monkeypatch):
    store.put_new("d/a", b"")
    unlink = os.unlink

    def unlink_while_another_writes(name, **handle):
        unlink(name, **handle)
        (root / "d" / "late").write_bytes(b"")

    monkeypatch.setattr(os, "unlink", unlink_while_another_writes)
    store.delete_directory("d")
    assert files(root) == {"d/late": b""}


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


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_either_is_named(store, root, monkeypatch, code):
    refuse_links(monkeypatch, errno.EPERM)

    def renameat2(*_):
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(handles, "_libc", SimpleNamespace(renameat2=renameat2, syscall=handles._libc.syscall))
    with pytest.raises(OSError, match="neither hard links nor renaming that replaces nothing") as caught:
        store.put_new("key", b"one")
    assert "choose a directory on another one" in describe(caught.value, str(root))
    assert files(root) == {}


def test_a_link_that_nfs_reports_as_existing_though_it_made_it(store, root, monkeypatch):
    link = os.link

    def retried_link(source, target, **handles):
        link(source, target, **handles)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))

    monkeypatch.setattr(os, "link", retried_link)
    assert store.put_new("key", b"one") is True
    assert files(root) == {"key": b"one"}


def test_without_hard_links_too_exactly_one_process_creates_an_object(root):
    won = race(str(root), hard_links=False)
    assert files(root) == won


def test_libc_has_renameat2():
    assert handles._libc.renameat2
