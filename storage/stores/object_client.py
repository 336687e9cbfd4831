"""The client of an object store: connections, retries, credentials, and its errors as ours.

Credentials and the endpoint come from the usual AWS_* variables, and appear in no message.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import from_url

from storage.errors import ObjectStoreError
from storage.stores.location import VARIABLES

T = TypeVar("T")
_RETRY_SECONDS = 20  # a request is tried again for so long; then the caller's own retries begin
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_first_used_by: set[int] = set()  # the process that made the first client


def request_of(bucket: str, url: str, request: Callable[[Any], T], timeout: int) -> T:
    """Make a request; raise FileNotFoundError where there is no such object, else ObjectStoreError, for any failure."""
    if _first_used_by and os.getpid() not in _first_used_by:
        # The client has threads, which a fork leaves behind: it would wait for ever
        # (https://github.com/tokio-rs/tokio/issues/4301).
        raise ObjectStoreError(
            f"{url}: a process that was forked cannot use an object store that its parent has used: start it "
            "anew, as a DataLoader does with multiprocessing_context='spawn'"
        )
    try:
        return request(connect(bucket, timeout))
    except (BaseError, FileNotFoundError) as error:
        translated = translate(error, url, bucket)
    except ValueError as error:
        translated = ObjectStoreError(f"{url}: {_first_line(error)}")
    raise translated from None  # obstore's own text may repeat what signed the request


@lru_cache(maxsize=32)
def connect(bucket: str, timeout: int) -> Any:
    """Return obstore's client of a bucket; it keeps its connections, and is used by many threads."""
    _first_used_by.add(os.getpid())
    endpoint = next(filter(None, map(os.environ.get, _ENDPOINTS)), "")
    return from_url(
        bucket,
        client_options={
            "timeout": timedelta(seconds=timeout),
            "connect_timeout": timedelta(seconds=5),
            "allow_http": endpoint.startswith("http://"),
        },
        retry_config={
            "max_retries": 100,  # the time is what bounds them
            "backoff": {"base": 3, "max_backoff": timedelta(seconds=5)},
            "retry_timeout": timedelta(seconds=_RETRY_SECONDS),
        },
    )


def translate(error: Exception, url: str, bucket: str) -> OSError:
    """Return what obstore raises as an error of ours."""
    text = str(error)
    scheme = bucket.partition(":")[0]
    code = match[1] if (match := re.search(r"<Code>(\w+)</Code>", text)) else ""
    if code == "NoSuchBucket":
        see = "AWS_ENDPOINT_URL and AWS_REGION" if scheme == "s3" else VARIABLES[scheme]
        return ObjectStoreError(f"there is no bucket {bucket}: create it, or see {see}")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{url} does not exist")
    # Of a cloud machine's own role, which obstore asks for where the environment has none.
    if scheme == "s3" and "/latest/api/token" in text:
        return ObjectStoreError(
            f"{url}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a"
            " public bucket"
        )
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or re.search("40[13] (Forb|Unau)", text):
        reason = f"access denied{f' ({code})' if code else ''}"
        rights = "that they may read, list, write and delete there"
        return ObjectStoreError(f"{url}: {reason}: check the {VARIABLES[scheme]} credentials, and {rights}")
    if "error sending request" in text:
        endpoint = "AWS_ENDPOINT_URL" if scheme == "s3" else VARIABLES[scheme]
        return ObjectStoreError(f"{url}: no answer: check the network and {endpoint} ({_first_line(error)})")
    message = f"{url}: {code or _first_line(error)}"
    if scheme != "s3":
        message += f"; {VARIABLES[scheme]} variables say which store it is, and {scheme}:// is untested"
    return ObjectStoreError(message)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].partition("<")[0].strip()
