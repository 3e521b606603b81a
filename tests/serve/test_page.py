"""`reverie play RUN` as its user meets it: the page in headless Chromium, and every mistake as one
line.

The run is an untrained one, or that of REVERIE_DEMO_RUN (`make page`), trained by `make demo`; only
copies are touched.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from reverie.commands.play.serving import play
from reverie.commands.play.setup import resolve_play
from reverie.types import UserError
from tests.serve.browser import open_page, until
from tests.serve.fake import wait

pytestmark = pytest.mark.page

ROOT = pathlib.Path(__file__).parent.parent.parent
TRAINED = os.environ.get('REVERIE_DEMO_RUN')
trained = pytest.mark.skipif(not TRAINED, reason='only a trained run does this; make page')


@pytest.fixture(scope='module')
def played(run_folder, tmp_path_factory):
    """The run folder on the page."""
    return (
        shutil.copytree(TRAINED, tmp_path_factory.mktemp('demo') / 'run') if TRAINED else run_folder
    )


@pytest.fixture(scope='module')
def address(played, tmp_path_factory):
    """Address of a server that the command line started; ended by Ctrl-C."""
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': '1'}
    command = [
        sys.executable,
        '-m',
        'reverie.cli',
        'play',
        str(played),
        '--port',
        '0',
        '--no-browser',
    ]
    log = tmp_path_factory.mktemp('log') / 'play.txt'
    with open(log, 'w') as out:
        process = subprocess.Popen(
            [*command, '--players', '1', '--fps', '12'], env=env, stdout=out, stderr=out
        )
    found = lambda: re.search(r'http://\S+', log.read_text())
    wait(lambda: found() or process.poll() is not None, 180.0)
    assert process.poll() is None, log.read_text()
    stages = [line[:4] for line in log.read_text().splitlines() if line.startswith('[')]
    assert stages == ['[1/5', '[2/5', '[3/5', '[4/5', '[5/5'] and 'GFLOP a frame' in log.read_text()
    yield found().group(0)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0, log.read_text()[-2000:]
    assert 'Traceback' not in log.read_text()


@pytest.fixture(scope='module')
def page(address):
    with open_page(address) as page:
        yield page


def colours(page, canvas='screen'):
    """How many different colours are on the canvas."""
    return page.evaluate(
        "id => { const c = document.getElementById(id), context = c.getContext('2d');"
        ' const d = context.getImageData(0, 0, c.width, c.height).data;'
        ' return new Set(new Uint32Array(d.buffer)).size; }', canvas,
    )  # fmt: skip


def test_the_page_shows_the_game_its_keys_and_what_the_agent_thinks(page):
    preset = 'dreamer4_demo' if TRAINED else 'dreamer4_debug'
    assert f'{preset} on minatar/breakout' in page.inner_text('#title')
    assert (
        page.locator('#actions button').count() == 6 and page.locator('#legend span').count() == 4
    )
    assert [page.inner_text(f'#actions button:nth-child({i}) span') for i in (1, 2)] == [
        'noop',
        'left',
    ]
    until(page, "document.getElementById('reward').textContent !== '–'")
    assert colours(page) > 1
    assert (
        page.evaluate("getComputedStyle(document.getElementById('screen')).imageRendering")
        == 'pixelated'
    )
    assert page.inner_text('#view') == 'dream' and page.inner_text('#who') == 'you play'
    assert page.inner_text('#actions button:nth-child(1) em').endswith('%')
    assert re.fullmatch(r'-?\d+\.\d\d', page.inner_text('#value'))


def test_a_key_and_a_touch_change_the_game_and_their_delay_is_shown(page):
    page.keyboard.down('ArrowRight')
    until(page, 'newest.action[3] === 1')
    page.keyboard.up('ArrowRight')
    until(page, 'newest.action[0] === 1')
    box = page.locator('#actions button:nth-child(6)').bounding_box()
    page.mouse.move(box['x'] + 10, box['y'] + 10)
    page.mouse.down()
    until(page, 'newest.action[5] === 1')
    page.mouse.up()
    until(page, 'newest.action[0] === 1')
    until(page, "/^\\d+ ms$/.test(document.getElementById('p95').textContent)")


def test_pause_single_steps_and_resets(page):
    pause_in_play(page)
    stopped = settled(page)
    page.keyboard.press('.')
    until(page, f'newest.t > {stopped}')
    assert settled(page) == stopped + 1
    start = page.evaluate('newest.start')
    page.keyboard.press('Shift+R')
    until(page, 'newest.t === 0')
    assert page.evaluate('newest.start') == start
    page.keyboard.press('r')
    until(page, f'newest.start !== {start} && newest.t === 0')
    page.keyboard.press('Space')
    until(page, '!state.paused && newest.t > 2')


def pause_in_play(page):
    """Pause before the game is over, which comes soon to who holds still."""
    page.keyboard.press('r')
    until(page, 'newest.t > 0 && !newest.over')
    page.keyboard.press('Space')
    until(page, 'state.paused')
    settled(page)
    assert not page.evaluate('newest.over')


def settled(page):
    """The frame's number once no more frames arrive: the same at four looks, 100 ms apart."""
    end, seen = time.monotonic() + 120.0, []
    while len(seen) < 4 or len(set(seen[-4:])) > 1:
        assert time.monotonic() < end, f'frames keep arriving: {seen[-4:]}'
        seen.append(page.evaluate('newest.t'))
        page.wait_for_timeout(100)
    return seen[-1]


def test_human_and_agent_dream_and_reality_and_sampling_steps_switch(page):
    page.keyboard.press('m')
    until(
        page, "newest.by_agent && document.getElementById('who').textContent === 'the agent plays'"
    )
    page.keyboard.press('Tab')
    until(
        page,
        "newest.view === 'real' && newest.t > 1 && document.getElementById('view').textContent === 'real game'",
    )
    start = page.evaluate('newest.start')
    assert colours(page) <= 5  # the real game has no shades
    page.keyboard.press('Tab')
    until(page, "newest.view === 'dream' && newest.t > 1")
    assert page.evaluate('newest.start') == start
    page.keyboard.press('b')
    until(
        page, "newest.view === 'both' && / dB$/.test(document.getElementById('psnr').textContent)"
    )
    assert colours(page, 'screen2') > 1 and page.is_visible('#real')
    page.keyboard.press('b')
    page.keyboard.press('[')
    until(page, f"newest.steps === {1 if TRAINED else 2} && newest.view === 'dream'")
    page.keyboard.press('m')
    until(page, '!newest.by_agent')


@trained
def test_the_paddle_obeys_in_the_dream_and_the_agent_earns_rewards(page):
    page.keyboard.press(']')
    until(page, 'newest.steps === 2')
    apart = []
    while len(apart) < 8:  # beginnings; chance and a wall cut the way short in some
        pause_in_play(page)
        ends = [paddle_after(page, key) for key in ('ArrowLeft', 'ArrowRight')]
        if None not in ends:
            apart.append(ends[1] - ends[0])
        page.keyboard.press('Space')
        until(page, '!state.paused')
    assert np.mean(apart) > 2, apart
    page.keyboard.press('m')
    page.keyboard.press('r')
    until(page, 'newest.by_agent && rewards.some(reward => reward > 0.5)')
    assert page.evaluate('newest.score') > 0.5
    page.keyboard.press('m')
    until(page, '!newest.by_agent')


def paddle_after(page, key):
    """The column of the paddle after four frames from the beginning with a key held; None if the game
    is over by then.
    """
    page.keyboard.press('Shift+R')
    until(page, 'newest.t === 0')
    page.keyboard.down(key)
    for t in (1, 2, 3, 4):
        page.keyboard.press('.')
        until(page, f'newest.t === {t} || newest.over')
        if page.evaluate('newest.over'):
            break
    page.keyboard.up(key)
    return None if page.evaluate('newest.over') else paddle(page)


def paddle(page):
    """The column of the paddle: the mean of the bottom row's, weighted by how blue they are."""
    rgba = page.evaluate(
        "(() => { const c = document.getElementById('screen');"
        " return Array.from(c.getContext('2d').getImageData(0, c.height - 1, c.width, 1).data); })()"
    )
    blue = np.array(rgba).reshape(-1, 4)[:, 2].astype(float)
    return (blue * np.arange(len(blue))).sum() / blue.sum()


def test_a_recording_is_saved_and_offered(page, played):
    before = set((played / 'plays').glob('*.gif'))
    page.click('[data-do=gif]')
    until(page, "document.querySelector('#toast a') !== null")
    (saved,) = set((played / 'plays').glob('*.gif')) - before
    assert page.evaluate("document.querySelector('#toast a').download") == saved.name


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda f: f / 'nowhere', ['nowhere', 'run folder', 'dreamer4_demo']),
        (lambda f: shutil.rmtree(f / 'checkpoints'), ['no checkpoint']),
        (lambda f: (f / 'config.json').write_text('{"preset": "dreamer4_de'), ['config.json', 'cannot be read']),
        (lambda f: (f / 'config.json').write_text('{}'), ['config.json', 'preset']),
        (lambda f: next(f.glob('checkpoints/*/params/*')).unlink(), ['no sound checkpoint', 'damaged']),
        (lambda f: widen(f / 'config.json'), ['weights', 'shape', 'another config']),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_played_is_one_line_that_says_why(run_folder, tmp_path, change, words):
    folder = pathlib.Path(shutil.copytree(run_folder, tmp_path / 'run'))
    made = change(folder)
    target = made if isinstance(made, pathlib.Path) else folder
    with pytest.raises(UserError) as error:
        resolve_play(str(target), None, {}, 0).params()
    assert all(word in str(error.value) for word in words), error.value
    assert '\n' not in str(error.value)


def widen(path):
    saved = json.loads(path.read_text())
    saved['config']['head_units'] *= 2
    path.write_text(json.dumps(saved))


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(players=0), ['--players 0']),
        (dict(pace=1000.0), ['--fps 1000']),
        (dict(steps=3), ['--steps 3', '(1, 2, 4)']),
        (dict(seed=1), ['--seed 1']),
        (dict(env_name='minatar/asterix'), ['--env']),
    ],
)
def test_an_option_out_of_range_is_one_line_that_says_what_was_expected(run_folder, options, words):
    with pytest.raises(UserError) as error:
        play(str(run_folder), **{'port': 0, 'browser': False, 'say': lambda line: None, **options})
    assert all(word in str(error.value) for word in words), error.value


def test_a_port_in_use_is_said_before_anything_is_loaded():
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port, said = taken.getsockname()[1], []
        with pytest.raises(UserError, match=f'127.0.0.1:{port}'):
            play('nowhere', port=port, browser=False, say=said.append)
        assert not said
