"""Every preset that plays must find the best policy of a probe, from its own play, in a few hundred
updates.
"""

import dataclasses

import jax
import numpy as np
import pytest

from reverie.agents import registry
from reverie.agents.dreamer.config import Adams, LaProp
from reverie.envs.device import TimeLimit
from reverie.envs.memory import Cue
from reverie.evaluation.returns import evaluate
from reverie.training.online import CollectConfig, Online
from reverie.training.run import run
from reverie.types import UserError
from tests.probes import Counter, Match
from tests.small import shrink

pytestmark = pytest.mark.probe

# Of presets that differ in a number or in size alone, one is enough.
ALIKE = ('debug', 'release', 'small', 'control')
PLAYING = [
    n for n in registry.PRESETS if hasattr(registry.get(n), 'replay') and not n.endswith(ALIKE)
]
STEPS = 30


def counting(name):
    """-> (config, environment, steps of an episode)."""
    cfg = shrink(registry.get(name))
    if name != 'transdreamer':
        return cfg, Counter(3), STEPS
    # Its positions count from a window's first step, so an episode has to fit into a window. Its
    # policy reads layers without a norm, whose numbers are large: it begins undecided and moves
    # slowly, so that it does not converge before the model.
    cfg = dataclasses.replace(
        cfg, policy_out_scale=0.01, optimiser=Adams(3e-3, 4e-4, 1e-3), steps=400
    )
    return cfg, TimeLimit(Counter(3), 7), 7


def played(cfg, env, folder, steps=STEPS):
    """-> mean return of the trained policy over episodes of so many steps, sampled and greedy."""
    agent, r = registry.make(cfg, env.spec), cfg.replay
    source = Online(
        env,
        agent.explorer,
        CollectConfig(r.envs, r.capacity, r.ratio, r.prefill, r.random_prefill, context=r.context),
    )
    params = run(agent, source, folder, updates_per_call=100, checkpoint_every_s=1e9)
    readout = agent.readouts['agent']
    params = readout.params(jax.tree.map(lambda x: x[0], params))
    play = lambda greedy: evaluate(
        env,
        readout.actor,
        params,
        jax.random.key(0),
        episodes=32,
        max_steps=steps,
        greedy=greedy,
        chunk=steps,
    )
    return [float(play(greedy).returns.mean()) for greedy in (False, True)]


@pytest.mark.parametrize('name', [n for n in PLAYING if n != 'planet'])
def test_the_agent_counts_up_and_then_waits(name, tmp_path):
    cfg, env, steps = counting(name)
    sampled, greedy = played(cfg, env, tmp_path, steps)
    assert greedy > 0.9 * steps  # random play scores a third
    assert sampled > 0.7 * steps


@pytest.mark.parametrize('name', ['planet'])
def test_the_agent_chooses_the_number_it_sees(name, tmp_path):
    sampled, greedy = played(shrink(registry.get(name)), Match(), tmp_path)
    assert np.minimum(sampled, greedy) > 0.8 * STEPS  # a blind policy scores at most 0.4


def test_planet_refuses_discrete_actions():
    with pytest.raises(UserError, match='planet takes continuous'):
        registry.make(registry.get('planet'), Counter(3).spec)


def test_the_transformer_remembers_a_cue_that_it_no_longer_sees(tmp_path):
    cfg = shrink(registry.get('transdreamer_v3_small'), updates=600)
    replay = dataclasses.replace(cfg.replay, length=12)
    cfg = dataclasses.replace(cfg, replay=replay, optimiser=LaProp(1e-3, 20), imagine_last=6)
    sampled, greedy = played(cfg, Cue(3), tmp_path, steps=5)
    assert greedy > 0.85 and sampled > 0.8  # a policy without memory scores one half
