"""The store in an object store: the operations of `storage.stores.store` over obstore, for `s3://bucket/prefix`.

Creating is a PUT with `If-None-Match: *`. obstore cannot say that of a multipart upload
(https://github.com/apache/arrow-rs-object-store/issues/289), so a part goes up in one request: S3 takes 5 GB in one.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from obstore.exceptions import AlreadyExistsError, BaseError

from storage.errors import DamagedError, ReplacedError
from storage.stores.directory_store import MAX_OBJECT
from storage.stores.location import join, split_url
from storage.stores.object_client import request_of

T = TypeVar("T")
_SMALL, _LARGE = 30, 600  # seconds for one request: of a staged result, of a part
_HOLD_SECONDS = 5.0  # between two looks at the object that is held
_SHORT_RANGE = 1 << 20  # bytes
_CONCURRENCY = 16
_FEW = 100  # so many objects are asked for one by one rather than listed
_PUT_ID = "put-id"  # metadata of a created object: which PUT made it
_PARTIAL, _COPY = "halp-partial-", "halp-copy-"


class ObjectStore:
    """A store below a URL. Unfinished files and copies lie in this machine's directory for temporary files (TMPDIR)."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._bucket, self._prefix = split_url(url)
        self._held: tuple[str, bytes] | None = None
        self._compared = 0.0  # when it was last

    def address(self, key: str) -> str:
        """Return an object's URL, for messages."""
        return join(self._url, key)

    def get(self, key: str, limit: int = MAX_OBJECT) -> bytes:
        """Return an object's bytes. Raises FileNotFoundError, ObjectStoreError; DamagedError, unread, above `limit`."""
        if (data := self.get_bounded(key, limit)) is None:
            raise DamagedError(f"{self.address(key)} is larger than the {limit:,} bytes that an object of its kind has")
        return data

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes of an object, fewer at its end. Raises FileNotFoundError, ObjectStoreError."""
        timeout = _SMALL if length <= _SHORT_RANGE else _LARGE
        return self._ask(key, lambda client, at: bytes(client.get_range(at, start=start, length=length)), timeout)

    def get_start(self, key: str, length: int) -> tuple[bytes, int]:
        """Return an object's first bytes, and how many it has, by one request. Raises FileNotFoundError, ObjectStoreError."""

        def ask(client: Any, at: str) -> tuple[bytes, int]:
            try:
                result = client.get(at, options={"range": (0, length)})
            except BaseError as error:
                if "<Code>InvalidRange</Code>" in str(error):  # an empty object has no first byte
                    return b"", 0
                raise
            return bytes(result.bytes()), result.meta["size"]

        return self._ask(key, ask)

    def get_bounded(self, key: str, limit: int) -> bytes | None:
        """Return an object's bytes; None, without fetching them, where there are more than `limit`."""

        def ask(client: Any, at: str) -> bytes | None:
            result = client.get(at)  # the body is still to come
            return bytes(result.bytes()) if result.meta["size"] <= limit else None

        return self._ask(key, ask)

    def get_many(self, keys: Iterable[str], limit: int = MAX_OBJECT) -> Iterator[bytes]:
        """Yield the bytes of many objects in order, some fetched ahead. Raises FileNotFoundError, ObjectStoreError."""
        waiting: deque[Future[bytes]] = deque()
        pool = ThreadPoolExecutor(_CONCURRENCY)
        try:
            for key in keys:
                waiting.append(pool.submit(self.get, key, limit))
                if len(waiting) > _CONCURRENCY:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def size(self, key: str) -> int:
        """Return an object's length in bytes. Raises FileNotFoundError, ObjectStoreError."""
        return self._ask(key, lambda client, at: int(client.head(at)["size"]))

    def exists(self, key: str) -> bool:
        """Tell whether an object exists."""
        try:
            self.size(key)
        except FileNotFoundError:
            return False
        return True

    def missing(self, keys: Collection[str]) -> set[str]:
        """Return those of some keys that no object has: asked for one by one where they are few, else listed."""
        if len(keys) <= _FEW:
            with ThreadPoolExecutor(_CONCURRENCY) as pool:
                return {key for key, exists in zip(keys, pool.map(self.exists, keys)) if not exists}
        wanted = set(keys)

        def ask(client: Any, at: str) -> set[str]:
            for page in client.list(at or None, chunk_size=1000):
                wanted.difference_update(self._key(entry["path"]) for entry in page)
                if not wanted:
                    break
            return wanted

        return self._ask("", ask)

    def some(self, limit: int) -> Sequence[str]:
        """Return at most so many of the keys, in the order in which they are listed."""

        def ask(client: Any, at: str) -> Sequence[str]:
            found: deque[str] = deque()
            for page in client.list(at or None, chunk_size=1000):
                found += (self._key(entry["path"]) for entry in page)
                if len(found) >= limit:
                    break
            return tuple(islice(found, limit))

        return self._ask("", ask)

    def directories(self, prefix: str) -> Sequence[str]:
        """Return the sorted names directly below a prefix that have others below them."""
        return sorted(_name(path) for path in self._listing(prefix)["common_prefixes"])

    def list(self, prefix: str) -> list[str]:
        """Return the sorted names directly below a prefix; empty where there is no such prefix."""
        listing = self._listing(prefix)
        return sorted(map(_name, [*listing["common_prefixes"], *(entry["path"] for entry in listing["objects"])]))

    def sizes(self) -> dict[str, int]:
        """Return the objects directly below the root, each with its length in bytes."""
        return {_name(entry["path"]): entry["size"] for entry in self._listing("")["objects"]}

    def hold(self, key: str, data: bytes) -> None:
        """From now on change nothing unless the object `key` has this content: every change raises ReplacedError else.

        Asked for again with each part, and otherwise every few seconds only: what is staged says whose it is.
        """
        self._held = key, data
        self._compared = time.monotonic()

    def check(self) -> None:
        """Raise ReplacedError where the object that is held has another content, or is gone."""
        self._compare(_HOLD_SECONDS)

    def _compare(self, age: float) -> None:
        if self._held is None or time.monotonic() - self._compared < age:
            return
        key, data = self._held
        try:
            found = self.get_bounded(key, len(data))
        except FileNotFoundError:
            raise ReplacedError(f"{self.address(key)} is gone: the run was removed or moved") from None
        if found != data:
            raise ReplacedError(f"{self.address(key)} is not what it was: another run was begun there")
        self._compared = time.monotonic()

    def put_new(self, key: str, data: bytes) -> bool:
        """Create an object; return False, changing nothing, where it exists already."""
        self.check()
        return self._create(key, data, _SMALL)

    def put(self, key: str, data: bytes) -> None:
        """Create or replace an object."""
        self.check()
        self._ask(key, lambda client, at: client.put(at, data, use_multipart=False))

    @contextmanager
    def partial(self) -> Iterator[Path]:
        """Yield a new local path for unfinished content; whatever is left there at the end is removed."""
        with tempfile.TemporaryDirectory(prefix=_PARTIAL) as directory:
            yield Path(directory) / "object"

    def publish(self, temporary: Path, key: str) -> bool:
        """Make a finished file of `partial` the object `key`; return False where the object exists already."""
        self._compare(0.0)
        return self._create(key, temporary, _LARGE)

    def delete_partials(self, older_than: float) -> None:
        """Remove the unfinished files that nobody has written to for `older_than` seconds: a killed process left them."""
        limit = time.time() - older_than
        for directory in Path(tempfile.gettempdir()).glob(f"{_PARTIAL}*"):
            with suppress(OSError):  # another process removes it too, or it is another user's
                if all(path.stat().st_mtime < limit for path in (directory, *directory.iterdir())):
                    for path in directory.iterdir():
                        path.unlink()
                    directory.rmdir()

    @contextmanager
    def local_copy(self, key: str) -> Iterator[Path]:
        """Download an object and yield where it lies until the end of the block. Raises FileNotFoundError."""
        with tempfile.TemporaryDirectory(prefix=_COPY) as directory:
            path = Path(directory) / _name(key)
            self._ask(key, lambda client, at: _download(client, at, path), _LARGE)
            yield path

    def move(self, key: str, target: str) -> None:
        """Give an object another key, if it is there. Stopped halfway it has both."""
        self.check()
        with suppress(FileNotFoundError):
            self._ask(key, lambda client, at: client.rename(at, self._at(target)), _LARGE)

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        self.check()
        with suppress(FileNotFoundError):  # S3 does not say; others do
            self._ask(key, lambda client, at: client.delete(at))

    def delete_directory(self, prefix: str) -> None:
        """Remove the objects directly below a prefix, a thousand with each request."""
        self.check()
        paths = [entry["path"] for entry in self._listing(prefix)["objects"]]
        if paths:
            with suppress(FileNotFoundError):
                self._ask(prefix, lambda client, _: client.delete(paths))

    def _create(self, key: str, content: bytes | Path, timeout: int) -> bool:
        put_id = secrets.token_hex(8)

        def ask(client: Any, at: str) -> bool:
            try:
                client.put(at, content, mode="create", attributes={_PUT_ID: put_id}, use_multipart=False)
            except AlreadyExistsError:
                # It may be our own: obstore sends a PUT again whose answer was lost. An NFS client does the same.
                created: bool = client.get(at, options={"head": True}).attributes.get(_PUT_ID) == put_id
                return created
            return True

        try:
            return self._ask(key, ask, timeout)
        except FileNotFoundError:  # deleted again between the two requests
            return False

    def _listing(self, prefix: str) -> Any:
        return self._ask(prefix, lambda client, at: client.list_with_delimiter(at or None))

    def _at(self, key: str) -> str:
        return "/".join(filter(None, (self._prefix, key)))

    def _key(self, path: str) -> str:
        return path.removeprefix(f"{self._prefix}/") if self._prefix else path

    def _ask(self, key: str, request: Callable[[Any, str], T], timeout: int = _SMALL) -> T:
        """Make a request; raise FileNotFoundError where there is no such object, else ObjectStoreError, for any failure."""
        return request_of(self._bucket, self.address(key), lambda client: request(client, self._at(key)), timeout)


def _download(client: Any, at: str, path: Path) -> None:
    with path.open("wb") as file:
        for chunk in client.get(at).stream():
            file.write(chunk)


def _name(path: str) -> str:
    return path.rpartition("/")[2]
