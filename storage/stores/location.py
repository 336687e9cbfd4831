"""A location: the directory or the URL (`s3://bucket/prefix`) that a run or its images lie in, as a string."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from storage.errors import UserError

# The schemes that obstore is asked for, with the variables that it takes credentials from. Tested: s3 alone.
VARIABLES = {"s3": "AWS_*", "gs": "GOOGLE_*", "az": "AZURE_STORAGE_*"}
_URL = re.compile(r"([a-z0-9]+)://([^/]*)(?:/(.*))?", re.DOTALL)


def is_url(location: str | Path) -> bool:
    """Tell whether a location is in an object store."""
    return isinstance(location, str) and "://" in location


def resolve_location(location: str | Path) -> str:
    """Return a location in its one spelling: a directory absolute with its links followed, a URL without a slash at its end.

    Raises UserError where a URL is none that we can use.
    """
    if not is_url(location):
        return str(Path(location).resolve())
    bucket, prefix = split_url(str(location))
    return f"{bucket}/{prefix}" if prefix else bucket


def split_url(url: str) -> tuple[str, str]:
    """Return a URL's bucket, such as `s3://bucket`, and the prefix in it. Raises UserError."""
    match = _URL.fullmatch(url)
    scheme, bucket, prefix = match.groups() if match else ("", "", "")
    if scheme not in VARIABLES or not bucket:
        raise UserError(
            f"{url} is no location that we know: name a directory, or s3://BUCKET/PREFIX (gs:// and az:// are untested)"
        )
    if "@" in bucket or ":" in bucket:  # it would stand in run.json, in messages and in logs
        raise UserError(f"{scheme}://…/{prefix or ''} carries credentials or a port: set {VARIABLES[scheme]} variables instead")
    prefix = (prefix or "").strip("/")
    if prefix and not {"", ".", ".."}.isdisjoint(prefix.split("/")):
        raise UserError(f"{url} has an empty name, `.` or `..` in it: spell the prefix out")
    return f"{scheme}://{bucket}", prefix


def join(location: str, name: str) -> str:
    """Return the location `name` below a location."""
    return f"{location}/{name}" if name else location


def is_within(location: str, root: str) -> bool:
    """Tell whether a resolved location is a resolved root or lies below it."""
    if is_url(location) or is_url(root):
        return location == root or location.startswith(f"{root}/")
    return Path(location).is_relative_to(root)


def split_roots(text: str) -> list[str]:
    """Return the locations of a list: JSON, or separated by `:`, which no path in it may hold; that of `://` is its URL's."""
    if text.startswith("["):
        with suppress(ValueError):
            found = json.loads(text)
            if isinstance(found, list) and all(isinstance(place, str) for place in found):
                return [place for place in found if place]
    return [part for part in re.split(r":(?!//)", text) if part]


def join_roots(locations: Iterable[str]) -> str:
    """Return a list of locations for `split_roots`, whatever characters their names hold."""
    return json.dumps(list(locations))
