"""Players in environments that live in processes of their own, and what is left of those processes."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reverie.agents import registry
from reverie.commands.play import serving as command
from reverie.envs.host import HostVector
from reverie.serve.hosted import HostSession
from reverie.serve.session import Session
from reverie.types import ActionSpace, EnvSpec, Step, UserError
from tests.envs import toys
from tests.envs.test_host import gone, pids
from tests.serve.conftest import random_params
from tests.serve.fake import Running, wait

HUMAN, BOTH = np.zeros(2, bool), np.ones(2, bool)


class Tally:
    """`toys.Tally` on the device."""

    spec = EnvSpec('Tally', (12, 12, 3), ActionSpace('discrete', 3))

    def _step(self, time, total, action, prev_action, reward, first):
        last = time == 5
        return (time, total), Step(
            toys.tally(time, total, action, 12, jnp), prev_action, reward, first, last, last
        )

    def reset(self, key):
        none = jnp.zeros((), jnp.int32)
        return self._step(none, none, none, jnp.zeros(3), jnp.zeros(()), jnp.asarray(True))

    def step(self, state, action, key):
        time, total = state[0] + 1, state[1] + action
        paid = total.astype(jnp.float32)
        return self._step(time, total, action, jax.nn.one_hot(action, 3), paid, jnp.asarray(False))


@pytest.fixture(scope='module')
def agent():
    return registry.make(registry.dreamer_v3_debug(), Tally.spec)


@pytest.fixture(scope='module')
def session(agent):
    make = lambda slot: HostVector(toys.Tally, 1, size=12, seed=slot)
    session = HostSession(agent, random_params(agent), make, slots=2, context=2, seed=5)
    yield session
    ours = [pid for vector in session.vectors for pid in pids(vector)]
    assert not any(map(gone, ours))
    session.close()
    assert all(map(gone, ours))


def test_a_game_on_the_host_is_played_as_the_same_game_on_the_device(session, agent):
    """Frame by frame: alone, beside the dream, by hand, by the agent, one player or both, past an
    episode's end.
    """
    twin = Session(agent, session.params, Tally(), slots=2, context=2, seed=5, pipelined=False)
    agents, second = np.array([True, False]), np.array([False, True])
    orders = [
        ('real', (1, 2), HUMAN, BOTH),
        ('real', (1, 2), BOTH, BOTH),
        ('real', (2, 1), HUMAN, second),
        ('real', (0, 1), agents, BOTH),
        ('real', (0, 1), HUMAN, BOTH),
        ('both', (2, 0), agents, BOTH),
        ('both', (1, 1), HUMAN, BOTH),
    ]
    ends = []
    for number in (3, 4):
        for slot, real in ((0, True), (1, False)):
            starts = [s.start(slot, number + slot, real=real) for s in (session, twin)]
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-6), *starts
            )  # values of 1e6
        for view, chosen, by_agent, rows in orders:
            action = np.eye(3, dtype=np.float32)[list(chosen)]
            shown, expected = (
                jax.device_get(s.frame(action, by_agent, rows, view)) for s in (session, twin)
            )
            for name, a, b in zip(shown._fields, shown, expected, strict=True):
                if b is None:
                    assert a is None
                else:
                    atol = 1 if name == 'image' else 1e-4
                    np.testing.assert_allclose(
                        a[rows], b[rows], atol=atol, rtol=1e-6, err_msg=name
                    )  # values of 1e6
            ends.append(expected.is_last[rows].any() and view == 'real')
    assert sum(ends) >= 2 and not session.notices()


def test_a_page_plays_on_when_a_worker_dies_and_hears_why(session, tmp_path):
    with Running(session, tmp_path, pace=20.0) as running, running.join() as page:
        page.send(type='set', field='view', value='real')
        page.send(type='act', action=2, id=1)
        _, (picture,) = page.frames(
            lambda h: h['id'] == 1 and h['view'] == 'real' and h['score'] > 0, 60.0
        )[-1]
        red, green, blue = np.frombuffer(picture, np.uint8).reshape(12, 12, 3)[7, 5]
        assert (
            red in (40, 80, 120, 160, 200) and green % 20 == 0 and blue == 200
        )  # the environment's own picture
        page.send(type='set', field='view', value='both')
        header, pictures = page.frames(lambda h: h['view'] == 'both' and h['t'] == 1, 60.0)[-1]
        assert len(pictures) == 2 and np.isfinite(header['psnr'])
        page.send(type='set', field='view', value='real')
        page.frames(lambda h: h['view'] == 'real', 60.0)
        (pid,), (other,) = pids(session.vectors[0]), pids(session.vectors[1])
        os.kill(pid, signal.SIGKILL)
        while 'begins again' not in (text := page.notice('notice', 30.0)['text']):
            continue
        assert text == 'the environment failed and begins again: its process was ended by SIGKILL'
        page.frames(lambda h: h['view'] == 'real' and h['score'] > 0, 30.0)
        assert gone(pid) and pids(session.vectors[1]) == [other]
    wait(lambda: not running.engine.players)


def test_an_environment_that_fails_for_good_is_one_line(agent):
    make = lambda slot: HostVector(toys.unbuildable, 1)
    with pytest.raises(UserError, match='unbuildable cannot be built: OSError: no such cartridge'):
        HostSession(agent, random_params(agent), make)


def test_the_command_plays_a_gymnasium_id_and_leaves_no_process(monkeypatch):
    seen, resolve_play = [], command.resolve_play

    def serve(app, sock, ready):
        session = app.engine.session
        seen.extend(pid for vector in session.vectors for pid in pids(vector))
        assert not any(map(gone, seen)) and app.hello['views'] == ('dream', 'real', 'both')
        assert [b['chords'] for b in app.hello['bindings']] == [
            (('x',),),
            (('c',),),
        ]  # CartPole: two choices
        one, other, again = (session.start(0, number, real=True) for number in (1, 2, 1))
        assert (
            one.image.shape == (1, 4) and (one.image != other.image).all()
        )  # numbers, as everywhere
        np.testing.assert_array_equal(one.image, again.image)
        np.testing.assert_array_equal(one.probs, again.probs)
        raise KeyboardInterrupt

    def random_cast(*args):
        setup = resolve_play(*args)
        return dataclasses.replace(setup, params=lambda: random_params(setup.agent))

    monkeypatch.setattr(command, 'serve', serve)
    monkeypatch.setattr(
        command, 'resolve_play', random_cast
    )  # these three: nothing is compiled but a start
    monkeypatch.setattr(command, 'warm', lambda session: 1.0)
    monkeypatch.setattr(command, 'expectation', lambda session: '')
    quietly = dict(port=0, players=1, browser=False, say=lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        command.play('dreamer_v3_debug', env_name='gym/CartPole-v1', **quietly)
    assert len(seen) == 1 and gone(seen[0])
