"""One Dreamer 4, trained on recordings of two tasks with opposite rewards, does the one it is told."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reverie.commands.experiment import Recorded, load
from reverie.data.opening import open_source
from reverie.evaluation.openloop import dream
from tests.probes import left, record, right
from tests.small import dreamer4

pytestmark = [pytest.mark.slow, pytest.mark.probe]
TASKS = ('left', 'right')
STEPS = 30


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('tasks')
    data = (record(path / 'a', left(), 'left'), record(path / 'b', right(), 'right', seed=1))
    experiment = Recorded('dreamer4_debug', dreamer4(), 'tests.probes:left', data=data)
    experiment.train(path / 'run', updates_per_call=50, checkpoint_every_s=1e9)
    return path / 'run'


@pytest.fixture(scope='module')
def told(folder):
    experiment, params = load(folder)
    return experiment.told(), params


def returns(experiment, agent, params, name='imagination'):
    readout = agent.readouts[name]
    how = dict(episodes=32, max_steps=STEPS, greedy=False)
    scores = experiment.score(readout.actor, readout.params(params), jax.random.key(0), **how)
    return float(scores.returns.mean())


def test_the_policy_does_the_task_that_it_is_told(told):
    experiments, params = told
    assert [e.task_name for e in experiments] == list(TASKS)
    for mine, other in zip(experiments, experiments[::-1], strict=True):
        assert returns(mine, mine.agent, params) > STEPS - 5  # random play earns 0
        assert returns(mine, other.agent, params) < -(STEPS - 5)  # told the other task
        assert returns(mine, mine.agent, params, 'wm_bc') < STEPS - 10  # and it is not cloned


def test_dreams_of_one_world_pay_for_the_task_that_is_told(told):
    experiments, params = told
    one = jax.tree.map(lambda x: x[0], params)
    source = open_source(experiments[0].episodes, experiments[0].spec)
    batch = source.draw(source.data, None, jax.random.key(3), 64, 6)
    step = jax.tree.map(lambda x: x.swapaxes(0, 1), batch.step)

    def imagined(agent, action):
        @jax.jit
        def run(params):
            model = agent.model(params)
            keys = jax.random.split(jax.random.key(0), 12)
            observe = lambda state, x: model.observe(state, *x)
            state, _ = jax.lax.scan(observe, model.initial(64), (step, keys[:6]))
            actions = jnp.broadcast_to(jax.nn.one_hot(action, 2), (6, 64, 2))
            return dream(model, state, actions, keys[6:])

        found = run(one)
        return float(found.reward.sum(0).mean()), np.asarray(found.image)

    dreams = [[imagined(e.agent, action) for action in (0, 1)] for e in experiments]
    (left_left, left_right), (right_left, right_right) = [[r for r, _ in row] for row in dreams]
    assert left_left > 3 and right_right > 3  # of about 5; both actions at random earn 0
    assert left_right < -3 and right_left < -3
    for action in (0, 1):  # and the world is the same
        np.testing.assert_array_equal(dreams[0][action][1], dreams[1][action][1])


def test_every_task_has_scores_of_its_own(folder, told, monkeypatch):
    from reverie.commands import evaluate

    monkeypatch.setattr('reverie.commands.evaluate.keep_programs', lambda cache: None)
    evaluate.run(evaluate.Eval(folder, episodes=8, max_steps=STEPS))
    for file, task in (('scores.json', 'left'), ('scores-right.json', 'right')):
        record = json.loads((folder / file).read_text())
        assert record['task'] == task and record['env'] == f'tests.probes:{task}'
        assert record['score']['imagination']['mean'] > STEPS - 8
