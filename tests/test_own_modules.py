"""Presets, agents and environments of the reader's own modules, named `module:name`."""

import pathlib
import sys

import jax
import pytest

from reverie import imports
from reverie.agents import registry
from reverie.commands.play.setup import resolve_play
from reverie.commands.train import parse_train
from reverie.envs import device
from reverie.types import Agent, UserError
from tests.test_cli import fails

LAB = '''
import dataclasses
import jax.numpy as jnp
from reverie.agents import registry
from reverie.agents.dreamer.presets import dreamer_v3_debug
from reverie.types import ActionSpace, EnvSpec, Step

NUMBER = 3

def wide(size='small'):
    """A debug Dreamer V3 with a wider policy."""
    cfg = registry.get('dreamer_v3_debug')
    units = {'small': 24, 'large': 48}[size]
    return dataclasses.replace(cfg, policy=dataclasses.replace(cfg.policy, units=units))

def nothing():
    return 3

def needs(more):
    return registry.get('dreamer_v3_debug')

@dataclasses.dataclass(frozen=True)
class Wrapped:
    """A config of our own, and how its agent is made."""
    base: object = dataclasses.field(default_factory=registry.PRESETS['dreamer_v3_debug'])
    good: bool = True

    def make(self, spec):
        agent = registry.make(self.base, spec)
        return Unseen(agent) if self.good else 'agent'

class Unseen:
    """An agent that trains and is scored, and cannot be played in."""
    def __init__(self, agent):
        self.spec, self.phases, self.readouts = agent.spec, agent.phases, agent.readouts
        self.init, self.explorer = agent.init, agent.explorer

def bad_agent():
    return Wrapped(good=False)

@dataclasses.dataclass(frozen=True)
class Corridor:
    """Walk right to the end of a corridor."""
    length: int = 4

    @property
    def spec(self):
        return EnvSpec('corridor', (self.length,), ActionSpace('discrete', 2, ('left', 'right')))

    def _step(self, place, prev_action, is_first):
        end = place == self.length - 1
        obs = (jnp.arange(self.length) == place).astype(jnp.float32)
        return Step(obs, prev_action, end.astype(jnp.float32), is_first, end, end)

    def reset(self, key):
        place = jnp.zeros((), jnp.int32)
        return place, self._step(place, jnp.zeros(2), jnp.asarray(True))

    def step(self, state, action, key):
        place = jnp.clip(state + 2 * action - 1, 0, self.length - 1)
        return place, self._step(place, jnp.eye(2)[action], jnp.asarray(False))

class NoEnv:
    pass
'''


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """The current folder, with a module of its own that no other test sees."""
    (tmp_path / 'my_lab').mkdir()
    (tmp_path / 'my_lab' / '__init__.py').write_text('')
    (tmp_path / 'my_lab' / 'things.py').write_text(LAB)
    (tmp_path / 'my_lab' / 'broken.py').write_text('x = = 1')
    (tmp_path / 'my_lab' / 'lonely.py').write_text('import a_package_that_nobody_has')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [x for x in sys.path if x])
    yield tmp_path
    for name in [name for name in sys.modules if name.partition('.')[0] == 'my_lab']:
        del sys.modules[name]


def test_a_preset_of_ones_own_has_its_options_and_sizes(lab):
    args = parse_train('my_lab.things:wide', '--env', 'minatar/breakout', '--frames', '600')
    assert args.config.policy.units == 24 and args.frames == 600
    given = ('--size', 'large', '--config.value.units', '8')
    args = parse_train('my_lab.things:wide', '--env', 'minatar/breakout', *given)
    assert (args.config.policy.units, args.config.value.units) == (48, 8)


def test_an_agent_of_ones_own_is_made_by_its_config(lab):
    config, env = registry.get('my_lab.things:Wrapped'), device.make('my_lab.things:Corridor')
    assert isinstance(registry.make(config, env.spec), Agent)
    with pytest.raises(UserError, match=r'Wrapped.make returned str; expected an Agent'):
        registry.make(registry.get('my_lab.things:bad_agent'), env.spec)
    with pytest.raises(UserError, match=r'has no world model to play in'):
        resolve_play('my_lab.things:Wrapped', 'my_lab.things:Corridor', {}, 0)


def test_an_environment_of_ones_own_takes_options_and_is_played(lab):
    env = device.make('my_lab.things:Corridor', length=3)
    assert env.spec.obs_shape == (3,)
    vector = device.Vector(env, 2)
    state, step = vector.reset(jax.random.key(0))
    for _ in range(2):
        state, step = vector.step(state, jax.numpy.ones(2, int), jax.random.key(0))
    assert step.is_last.all() and step.reward.tolist() == [1.0, 1.0]
    setup = resolve_play('my_lab.things:wide', 'my_lab.things:Corridor', {'length': 3}, 0)
    assert setup.agent.spec == env.spec and setup.agent.cfg.policy.units == 24


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('my_lob.things:wide', ['no module my_lob;', 'current folder']),
        ('my_lab.thongs:wide', ['no module my_lab.thongs;']),
        ('my_lab.things:wild', ['my_lab.things has no wild', 'wide', 'Corridor']),
        ('my_lab.things:NUMBER', ['expected a function or class of my_lab, got 3']),
        ('my_lab.things:dreamer_v3_debug', ['expected a function or class of my_lab']),
        ('my_lab.things:nothing', ['returned int', 'DreamerConfig', 'make(spec) -> Agent']),
        ('my_lab.things:needs', ["missing a required argument: 'more'"]),
        ('my_lab.broken:wide', ['my_lab.broken cannot be imported: SyntaxError']),
        ('my_lab.lonely:wide', ['cannot be imported: No module named', 'a_package_that_nobody_has']),
        ('os:abort', ['os is a module of Python']),
        ('my lab:wide', ['is unknown', '<module>:<name>']),
    ],
)  # fmt: skip
def test_a_mistaken_preset_is_one_line(lab, capsys, monkeypatch, name, words):
    error = fails(capsys, monkeypatch, 'train', name, '--env', 'minatar/breakout')
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ('name', 'options', 'words'),
    [
        ('my_lab.things:NoEnv', {}, 'made NoEnv; expected an Env'),
        ('my_lab.things:Corridor', {'colour': 2}, "unexpected keyword argument 'colour'"),
        ('my_lab.things:Corridoor', {}, 'has no Corridoor'),
    ],
)
def test_a_mistaken_environment_is_one_line(lab, name, options, words):
    with pytest.raises(UserError, match=words) as error:
        device.make(name, **options)
    assert '\n' not in str(error.value)


def test_the_current_folder_hides_no_installed_module(lab):
    pathlib.Path('json.py').write_text('raise RuntimeError')
    imports.find('my_lab.things:wide')
    assert sys.path[-1] == str(lab) and sys.path.count(str(lab)) == 1
