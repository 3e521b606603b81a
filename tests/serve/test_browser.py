"""Opening the page: the token is for the player's eyes only."""

import html
import pathlib
import re
import stat
import urllib.request

from reverie.commands.play.browser import opener
from tests.serve.fake import TOKEN, wait

URL = f'http://127.0.0.1:8000/?token={TOKEN}&x=1'


def test_the_browser_is_given_a_file_that_only_its_owner_can_read_and_no_token():
    given = []
    with opener(given.append) as open_page:
        open_page(URL)
        wait(lambda: given)
        (argument,) = given
        assert TOKEN not in argument and argument.startswith('file://')
        path = pathlib.Path(urllib.request.url2pathname(argument.removeprefix('file://')))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        (leads_to,) = re.findall(r'content="0; url=([^"]*)"', path.read_text())
        assert html.unescape(leads_to) == URL
    assert not path.parent.exists()
