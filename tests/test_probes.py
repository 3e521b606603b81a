"""A whole Dreamer 4, trained by the runner on random play of a probe, must dream it right and act
in it best.
"""

import jax
import numpy as np
import pytest

from reverie.agents import registry
from reverie.evaluation.openloop import open_loop
from reverie.evaluation.returns import evaluate
from reverie.training.run import run
from tests.probes import Counter, RandomPlay
from tests.small import dreamer4

pytestmark = [pytest.mark.slow, pytest.mark.probe]


@pytest.fixture(scope='module', params=[2, 4], ids=['two states', 'counter'])
def trained(request, tmp_path_factory):
    env = Counter(request.param)
    agent = registry.make(dreamer4(), env.spec)
    params = run(
        agent,
        RandomPlay(env),
        tmp_path_factory.mktemp('run'),
        updates_per_call=50,
        checkpoint_every_s=1e9,
    )
    return env, agent, jax.tree.map(lambda x: x[0], params)


def test_dreamed_frames_and_rewards_are_those_of_the_world_under_the_same_actions(trained):
    env, agent, params = trained
    play = RandomPlay(env)
    step = play.draw(play.data, None, jax.random.key(7), 64, 12).step
    dream = jax.jit(lambda p: open_loop(agent.model(p, images=True), step, 4, jax.random.key(0)))(
        params
    )
    right = ((dream.image > 0.5) == step.obs).all((2, 3, 4))[:, 4:]
    assert float(right.mean()) > 0.9  # a coin flip each step leaves about 1 / size
    error = np.abs(np.asarray(dream.reward - step.reward))[:, 4:]
    assert float((error < 0.25).mean()) > 0.9


def test_the_policy_trained_in_imagination_finds_the_best_action_in_every_state(trained):
    env, agent, params = trained
    score = lambda name, greedy: float(
        evaluate(
            env, agent.readouts[name].actor, agent.readouts[name].params(params), jax.random.key(0),
            episodes=32, max_steps=30, greedy=greedy,
        ).returns.mean()
    )  # fmt: skip
    assert (
        score('imagination', True) > 30 - env.size
    )  # 29 or 30 of 30 in two states, at least 27 in four
    assert score('imagination', False) > 24
    assert score('wm_bc', False) < 20  # the data were random play
