"""The page of a world model alone whose actions have several parts: keys held together, the mouse."""

import numpy as np
import pytest

from reverie.types import ActionSpace, EnvSpec
from tests.serve.browser import open_page, until
from tests.serve.fake import TOKEN, WALKER, FakeSession, Running, wait

pytestmark = pytest.mark.page

REST = (1, 3, 0, 1.0)


class Walk(FakeSession):
    """Shows its actions: the picture shifts with the turns."""

    def _frame(self, rows, action, both=False):
        n, (h, w, _) = len(rows), self.shape
        y, x = np.mgrid[:h, :w]
        turns = action[0, 3:10]
        self.shift = getattr(self, 'shift', 0.0) + float(turns @ (np.arange(len(turns)) - 3))
        image = np.stack([128 + 100 * np.sin((x + self.shift) / 5), 4 * y, 2 * x + 0 * y], -1)
        frame = super()._frame(rows, action, both)
        return frame._replace(image=np.broadcast_to(image.astype(np.uint8), (n, h, w, 3)))


def serve(folder, space, pace=20.0):
    spec = EnvSpec('walk', (64, 64, 3), space)
    return Running(Walk(1, (64, 64, 3), spec, has_policy=False), folder, pace=pace)


@pytest.fixture(scope='module')
def running(tmp_path_factory):
    with serve(tmp_path_factory.mktemp('plays'), WALKER) as running:
        yield running


@pytest.fixture(scope='module')
def page(running):
    with open_page(f'http://127.0.0.1:{running.port}/?token={TOKEN}') as page:
        yield page


def arrives(page, *values):
    """The vector of these values comes with a frame."""
    vector = [
        float(i == v)
        for p, v in zip(WALKER.parts, values, strict=True)
        for i in range(len(p.choices))
    ] + [float(WALKER.parts[3].stored(values[3]))]
    until(page, f'newest.action.every((x, i) => Math.abs(x - {vector}[i]) < 0.002)')


def test_several_parts_are_held_at_once_and_the_last_key_of_a_part_wins(page, running):
    arrives(page, *REST)
    for key in ('w', 'ArrowLeft', 'x'):
        page.keyboard.down(key)
    arrives(page, 2, 1, 1, 1.0)
    assert running.session.asked[-1][3][0].tolist()[:12] == [0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert page.locator('#actions button.held').count() == 3
    page.keyboard.down('s')
    arrives(page, 0, 1, 1, 1.0)
    page.keyboard.up('s')
    page.keyboard.up('x')
    arrives(page, 2, 1, 0, 1.0)
    page.keyboard.down('ArrowDown')
    arrives(page, 2, 1, 0, 4.0)
    for key in ('w', 'ArrowLeft', 'ArrowDown'):
        page.keyboard.up(key)
    arrives(page, *REST)


def test_a_button_that_is_touched_holds_its_part_only(page):
    page.keyboard.down('w')
    box = page.locator('#actions button', has_text='hard right').bounding_box()
    page.mouse.move(box['x'] + 10, box['y'] + 10)
    page.mouse.down()
    arrives(page, 2, 6, 0, 1.0)
    page.mouse.up()
    page.keyboard.up('w')
    arrives(page, *REST)


def test_the_mouse_turns_by_small_middle_and_large_movements_and_clips(page):
    value = (
        '([x, part]) => { turning = {x, y: x}; const value = turned(hello.parts[part]);'
        ' turning = {x: 0, y: 0}; return value; }'
    )
    turns = [page.evaluate(value, [x, 1]) for x in (0, 1.9, 2, 8, 9, 39, 40, 900)]
    assert turns == [3, 3, 4, 4, 5, 5, 6, 6]
    assert [page.evaluate(value, [x, 1]) for x in (-1, -2, -9, -40)] == [3, 2, 1, 0]
    assert [page.evaluate(value, [x, 3]) for x in (0, 30, 90, -60)] == [1, 2.5, 4, -2]
    assert page.evaluate(value, [50, 0]) == 1  # no camera


def test_a_locked_pointer_turns_until_escape_and_keys_count_more(page, running):
    page.mouse.click(400, 400)
    until(page, 'document.pointerLockElement === document.getElementById("screen")')
    begin = len(running.session.asked)
    x, y = 400, 400
    for _ in range(12):
        x += 15
        page.mouse.move(x, y)
        page.wait_for_timeout(50)
    arrives(page, *REST)  # it holds still
    turns = [a[0][3:10].argmax() for *_, a, _ in running.session.asked[begin:]]
    assert {4, 5, 6} & set(turns) and not {0, 1, 2} & set(turns), turns
    begin = len(running.session.asked)
    page.keyboard.down('ArrowLeft')
    arrives(page, 2 - 1, 1, 0, 1.0)
    begin = len(running.session.asked)
    for _ in range(5):
        x += 15
        page.mouse.move(x, y)
        page.wait_for_timeout(50)
    assert {a[0][3:10].argmax() for *_, a, _ in running.session.asked[begin:]} == {1}
    page.keyboard.up('ArrowLeft')
    page.evaluate('document.exitPointerLock()')
    until(page, 'document.pointerLockElement === null')
    arrives(page, *REST)


def test_a_moving_mouse_does_not_let_orders_pile_up(page, running):
    page.click('#screen')
    until(page, 'document.pointerLockElement !== null')
    far = 0
    for i in range(40):
        page.mouse.move(300 + 40 * (i % 2) + i, 300 + 3 * i)
        if i % 4 == 0:
            page.keyboard.press('x')
        page.wait_for_timeout(30)
        far = max(far, page.evaluate('number - newest.id'))
    assert 0 < far <= 5
    page.evaluate('document.exitPointerLock()')
    arrives(page, *REST)


def test_what_needs_a_policy_or_heads_is_not_there(page):
    for hidden in ('[data-do=by]', '#value-section', '#reward-trace', '#score', '#cont', '#who'):
        assert not page.is_visible(hidden), hidden
    page.keyboard.press('m')
    page.wait_for_timeout(200)
    assert page.evaluate('socket.readyState') == 1 and not page.evaluate('state.by_agent')


def test_the_picture_fills_the_height_and_is_smooth_until_told_otherwise(page):
    style = "getComputedStyle(document.getElementById('screen')).imageRendering"
    box = page.locator('#screen').bounding_box()
    assert box['height'] > 660 and abs(box['height'] - box['width']) < 2
    assert box['y'] + box['height'] < 800
    assert page.evaluate(style) == 'auto'
    page.keyboard.press(',')
    assert page.evaluate(style) == 'pixelated'
    page.keyboard.press(',')
    assert page.evaluate(style) == 'auto'


GAPS = (
    'new Promise(done => { const seen = []; let t = newest.t; const look = () => {'
    ' if (newest.t !== t) { t = newest.t; seen.push(performance.now()); }'
    ' if (seen.length < 61) requestAnimationFrame(look);'
    ' else done(seen.map((x, i) => x - seen[i - 1]).slice(1)); }; look(); })'
)


def test_frames_are_shown_evenly_at_twenty_a_second(page):
    assert page.evaluate('state.pace') == 20
    seen = []
    for _ in range(4):  # other programs may have the processor for a while
        gaps = page.evaluate(GAPS)
        seen.append((np.mean(gaps), np.percentile(gaps, 90)))
        if 48 < seen[-1][0] < 52 and seen[-1][1] < 75:
            return
    raise AssertionError(seen)


def test_a_lost_connection_comes_back_quietly_with_what_is_held(page):
    page.keyboard.down('w')
    arrives(page, 2, *REST[1:])
    page.evaluate('{ const old = hello; socket.close(); hello === old; }')
    page.wait_for_timeout(100)
    assert not page.is_visible('#overlay')
    until(page, 'socket.readyState === 1')
    arrives(page, 2, *REST[1:])
    page.keyboard.up('w')
    arrives(page, *REST)
    assert page.is_visible('#screen') and not page.is_visible('#overlay')


def test_video_without_actions_has_a_page_without_keys(page, tmp_path):
    with serve(tmp_path, ActionSpace.composite(())) as running:
        other = page.context.browser.new_page()
        other.goto(f'http://127.0.0.1:{running.port}/?token={TOKEN}')
        until(other, 'newest !== null')
        other.keyboard.press('w')
        until(other, 'newest.t > 3')
        assert not other.is_visible('#panel-actions') and other.is_visible('#screen')
        other.close()
        wait(lambda: not running.engine.players)
