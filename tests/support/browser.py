"""A real headless Chromium that reports what a page complained of and what it fetched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

_CHROMIUM = "/usr/bin/chromium"  # Debian's; `make test` installs it
_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip


class Watched:
    """A page, with its errors and its requests."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a browser with a fresh profile; a machine without one skips, unless it is CI."""
    if shutil.which(_CHROMIUM) is None:
        if os.environ.get("CI"):
            pytest.fail("there is no chromium: apt-get install chromium")
        pytest.skip("there is no chromium: apt-get install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=_CHROMIUM, args=_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def watched_page(
    browser: Browser, scheme: Literal["light", "dark"] = "light", user: tuple[str, str] | None = None, width: int = 1200
) -> Iterator[Watched]:
    """Open a page of its own in a colour scheme, with a user's name and password."""
    context = browser.new_context(
        color_scheme=scheme,
        viewport={"width": width, "height": 900},
        http_credentials={"username": user[0], "password": user[1]} if user else None,
    )
    try:
        yield Watched(context.new_page())
    finally:
        context.close()
