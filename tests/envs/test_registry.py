"""Names of environments: the right ones, and those near a mistaken one."""

import pytest

from reverie.envs import registry
from reverie.envs.device import make, names
from reverie.types import UserError


@pytest.mark.parametrize(('given', 'meant'), [
    ('MinAtar/Breakout-v1', 'minatar/breakout'), ('minatar/SpaceInvaders', 'minatar/space_invaders'),
    ('breakout', 'minatar/breakout'), ('ALE/Pong-v5', 'atari/pong'), ('ale/SpaceInvaders-v5', 'atari/space_invaders'),
    ('atari/MontezumaRevenge', 'atari/montezuma_revenge'), ('dm_control/walker-walk', 'dmc/walker_walk'),
    ('dmc/cartpole-swingup', 'dmc/cartpole_swingup'), ('control/Pendulum', 'control/pendulum'),
    ('minatar/asterx', 'minatar/asterix'),
])  # fmt: skip
def test_near_names_are_given(given, meant):
    assert registry.near(given)[0] == meant
    with pytest.raises(UserError, match=rf'did you mean {meant}'):
        raise registry.unknown(given)


def test_names_of_gymnasium_are_found_with_their_newest_version_first():
    pytest.importorskip('gymnasium')
    assert registry.near('CartPole-v1')[0] == registry.near('cartpole')[0] == 'gym/CartPole-v1'


@pytest.mark.parametrize(
    'name', ['', '/', 'gym', 'gym/', 'chess/e4', 'atari/Pong', 'dmc/walker-walk']
)
def test_what_cannot_be_a_host_environment_is_refused_without_a_process(name):
    with pytest.raises(UserError, match='is unknown'):
        registry.check(name)


def test_a_known_family_lists_its_own():
    with pytest.raises(UserError) as error:
        make('minatar/zaxxon')
    assert 'minatar/seaquest' in str(error.value) and 'control/' not in str(error.value)


def test_device_environments_are_made_by_one_function_and_take_no_copies():
    for name in names():
        assert registry.make(name).spec.name == name and not registry.on_host(name)
    with pytest.raises(UserError, match='runs on the device'):
        registry.make('minatar/breakout', 3)
    assert all(map(registry.on_host, ('gym/A', 'atari/pong', 'dmc/a_b', 'crafter/reward')))
