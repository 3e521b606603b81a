"""Opening the page in a browser without telling its token to other users of the machine."""

import contextlib
import html
import os
import pathlib
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def opener(open_file: Callable[[str], object] = webbrowser.open) -> Iterator[Callable[[str], None]]:
    """Give a function that opens an address in the browser.

    The arguments of a process can be read by everybody, so the browser is given a file instead
    that only its owner can read, which leads to the address. It is removed at the end.
    """
    with tempfile.TemporaryDirectory(prefix='reverie-play-', ignore_cleanup_errors=True) as folder:

        def open_page(url: str) -> None:
            path = pathlib.Path(folder) / 'page.html'
            address = html.escape(url)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'w') as file:
                file.write(
                    '<!doctype html><meta charset="utf-8"><title>Reverie</title>'
                    '<meta name="referrer" content="no-referrer">'
                    f'<meta http-equiv="refresh" content="0; url={address}">'
                    f'<a href="{address}">Play</a>\n'
                )
            # some browsers end only when their window is closed
            threading.Thread(target=open_file, args=(path.as_uri(),), daemon=True).start()

        yield open_page
