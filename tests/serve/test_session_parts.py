"""A world model alone whose actions have several parts, from a page's keys to its pictures."""

import dataclasses
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from reverie.agents import registry
from reverie.commands.experiment import Recorded
from reverie.commands.experiment.recorded import spec_of
from reverie.data.episodes import Episodes
from reverie.serve.session import Session
from reverie.types import ActionSpace, EnvSpec, Playable, Prediction, Step
from tests.serve.fake import WALKER, Running

SIDE = 16


class Place(NamedTuple):
    x: jax.Array  # [N]
    light: jax.Array  # [N]


@dataclasses.dataclass(frozen=True)
class Corridor:
    """A light that the turns move, and that is brighter after a shot."""

    weights: jax.Array  # [A, 2]: how far each entry of the action moves, and how bright it makes

    def initial(self, batch):
        return Place(jnp.zeros(batch), jnp.full(batch, 0.5))

    def _move(self, place, action):
        x, light = (action @ self.weights).T
        return Place((place.x + x) % SIDE, 0.5 + light)

    def observe(self, state, step, key):
        state = jax.tree.map(
            lambda x: jnp.where(step.is_first, 0.5, x), self._move(state, step.prev_action)
        )
        return state, state.x[:, None]

    def imagine(self, state, action, key):
        state = self._move(state, action)
        n = len(action)
        return state, Prediction(state.x[:, None], jnp.zeros(n), jnp.ones(n))

    def decode(self, state):
        bright = (jnp.arange(SIDE) == jnp.floor(state.x)[:, None]) * state.light[:, None]
        return jnp.broadcast_to(bright[:, None, :, None], (len(state.x), SIDE, SIDE, 3))


class Walker:
    """`Playable` without a policy."""

    phases, readouts = (), {}

    def __init__(self, space):
        self.spec = EnvSpec('corridor', (SIDE, SIDE, 3), space)

    def init(self, key):
        weights = np.zeros((self.spec.actions.size, 2), np.float32)
        if self.spec.actions.parts:
            weights[3:10, 0] = np.arange(-3, 4)
            weights[11, 1] = 0.4
        return {'world': jnp.array(weights)}

    def model(self, params):
        return Corridor(params['world'])

    def expected_return(self, params, feat):
        return None

    def choose(self, params, state, feat, key):
        return jnp.zeros((len(feat), self.spec.actions.size)), None


def recorded(agent):
    """Recordings of darkness, without actions."""

    def context(number):
        n, size = 3, agent.spec.actions.size
        first = np.arange(n)[None] == 0
        obs = np.zeros((1, n, SIDE, SIDE, 3), np.uint8)
        return Step(
            obs,
            np.zeros((1, n, size), 'f4'),
            np.zeros((1, n), 'f4'),
            first,
            ~first & False,
            first & False,
        )

    return context


def session(space):
    agent = Walker(space)
    assert isinstance(agent, Playable)
    params = agent.init(jax.random.key(0))
    return Session(agent, params, None, recorded(agent), slots=1)


@pytest.fixture(scope='module')
def running(tmp_path_factory):
    with Running(session(WALKER), tmp_path_factory.mktemp('plays'), pace=50.0) as running:
        yield running


def shown(picture):
    """Column of the light, and how bright it is."""
    row = np.frombuffer(picture, np.uint8).reshape(SIDE, SIDE, 3)[0, :, 0]
    return int(row.argmax()), int(row.max())


def test_orders_of_several_parts_move_the_picture(running):
    with running.join() as page:
        hello = page.notice('hello')
        assert hello['rest'] == [1, 3, 0, 1] and not hello['has_policy'] and hello['smooth']
        assert hello['views'] == ['dream'] and hello['sources'] == ['data']
        page.send(type='set', field='paused', value=True)
        page.notice('state')
        page.send(type='again')
        header, (picture,) = page.frames(lambda h: h['t'] == 0)[-1]
        at = shown(picture)[0]
        for t, (values, moved, bright) in enumerate(
            [([2, 5, 1, 1], 2, True), ([1, 0, 0, -2.0], -3, False), ([1, 3, 1, 4.0], 0, True)], 1
        ):
            page.send(type='act', action=values, id=t)
            page.send(type='step')
            header, (picture,) = page.frames(lambda h, t=t: h['t'] == t)[-1]
            assert header['id'] == t and header['value'] is None and header['probs'] is None
            assert header['cont'] == 1 and not header['over']
            at = (at + moved) % SIDE
            assert shown(picture) == (at, round(255 * (0.9 if bright else 0.5)))
        page.send(type='episode')
        saved = page.notice('saved')
        folder = pathlib.Path(saved['text'].split(' in ')[1])
        (record,) = Episodes(folder).records()
        scaled = [[2, 5, 1, 0], [1, 0, 0, -1], [1, 3, 1, 1]]
        np.testing.assert_allclose(record.action, [[-1, -1, -1, 0], *scaled], atol=1e-6)
        assert record.has_action and not record.has_reward
    recorded = Recorded('dreamer4_debug', registry.dreamer4_debug(), 'corridor', data=(folder,))
    known = json.loads(json.dumps(recorded.describe()['game']))
    assert spec_of('corridor', known).actions == WALKER  # a run plays without its recordings


def test_nothing_is_compiled_for_an_agent_that_cannot_play(running):
    assert running.session.ready('dream')
    assert {plays for _, _, plays in running.session._programs} == {False}


def test_an_order_that_the_agent_plays_ends_the_socket_with_one_line(running):
    with running.join() as page, pytest.raises(ConnectionClosed) as closed:
        page.send(type='set', field='by_agent', value=True)
        page.frames(lambda h: False)
    assert closed.value.rcvd.code == 1008 and 'no policy' in closed.value.rcvd.reason


def test_video_without_actions_plays_and_is_saved(tmp_path):
    with (
        Running(session(ActionSpace.composite(())), tmp_path, pace=50.0) as running,
        running.join() as page,
    ):
        page.send(type='act', action=[], id=1)
        page.frames(lambda h: h['id'] == 1 and h['t'] > 3)
        page.send(type='episode')
        (record,) = Episodes(page.notice('saved')['text'].split(' in ')[1]).records()
        assert record.action.shape == (len(record.reward), 0)
