"""A real browser for the tests of the page: Debian's Chromium without a window, driven by Playwright.

The binary is `LATENTAC_CHROMIUM`, else `chromium` on PATH. Playwright fetches none of its own.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

from tools.golang import Unavailable

# Root may not use the sandbox; and a browser of the tests shall talk to nobody but the page's server.
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium() -> str:
    """Path of the browser. Raises Unavailable if there is none, saying how to install it."""
    named = os.environ.get("LATENTAC_CHROMIUM")
    if named and not os.access(named, os.X_OK):
        raise Unavailable(f"LATENTAC_CHROMIUM = {named!r} is not an executable file. Correct or unset it.")
    found = named or shutil.which("chromium")
    if not found:
        raise Unavailable("there is no Chromium here. On Debian: apt-get install chromium")
    return found


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser that ends with the context. Raises Unavailable."""
    path = chromium()
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        try:
            yield running
        finally:
            running.close()
