"""The page in headless Chromium."""

import contextlib
import shutil
import time

import pytest

CHROMIUM = next(
    (p for name in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(name))),
    None,
)


@contextlib.contextmanager
def open_page(address):
    """The page at an address, once it shows a frame; errors on its console fail at the end."""
    if CHROMIUM is None:
        pytest.skip('no Chromium on this machine; install Debian’s chromium to test the page')
    playwright = pytest.importorskip(
        'playwright.sync_api', reason='the page is driven by playwright'
    )
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu']
        )
        page = browser.new_page(viewport={'width': 1280, 'height': 800})
        errors = []
        page.on('pageerror', lambda error: errors.append(str(error)))
        page.on(
            'console',
            lambda message: errors.append(message.text) if message.type == 'error' else None,
        )
        page.goto(address)
        until(page, 'newest !== null')
        yield page
        browser.close()
        assert not errors


def until(page, condition):
    """A JavaScript condition comes true.

    The page's policy forbids it to evaluate strings, so it is asked again.
    """
    end = time.monotonic() + 120.0
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)
