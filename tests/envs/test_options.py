"""Options of environments as people write them: of their type, or refused in one line."""

from typing import Literal

import pytest

from reverie.commands.arguments import options_of
from reverie.envs import device, host
from reverie.envs.options import typed
from reverie.types import UserError

KINDS = dict(
    flag=bool, count=int, rate=float, word=str, limit=int | None, how=Literal['a', 'b'],
    size=tuple[int, int],
)  # fmt: skip


@pytest.mark.parametrize(
    'text, value',
    [
        ('flag=false', False), ('flag=False', False), ('flag=NO', False), ('flag=off', False), ('flag=0', False),
        ('flag=true', True), ('flag=yes', True), ('flag=On', True), ('flag=1', True), ('count=3', 3),
        ('count=3.0', 3), ('count=1e3', 1000), ('rate=1', 1.0), ('rate=1e-3', 1e-3), ('word=off', 'off'),
        ('limit=none', None), ('limit=None', None), ('limit=7', 7), ('how=b', 'b'), ('size=64,32', (64, 32)),
        ('size=(64,32)', (64, 32)),
    ],
)  # fmt: skip
def test_an_option_is_of_its_declared_type(text, value):
    (found,) = typed('env', options_of([text]), KINDS).values()
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    'text',
    [
        'flag=maybe', 'flag=2', 'flag=0.0', 'flag=none', 'flag=[]', 'count=3.5', 'count=true', 'count=x',
        'count=inf', 'count=nan', 'count=', 'rate=fast', 'rate=False', 'rate=1e999', 'rate=nan', 'word=3',
        'limit=soon', 'how=c', 'size=64', 'size=1,2,3', 'size=a,b', 'rate=0x', 'other=1',
    ],
)  # fmt: skip
def test_anything_else_is_refused_by_name_with_what_was_expected(text):
    with pytest.raises(UserError, match=text.partition('=')[0] + r'.*expected') as error:
        typed('env', options_of([text]), KINDS)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'name, text',
    [
        ('minatar/breakout', 'ramping=maybe'),
        ('minatar/breakout', 'sticky=often'),
        ('minatar/freeway', 'time_limit=1.5'),
        ('control/pendulum', 'action_repeat=two'),
        ('control/cartpole_swingup', 'time_limit=true'),
        ('hidden_order/4', 'obs=pixels'),
        ('memory/8', 'delay=4'),
        ('gym/CartPole-v1', 'action_repeat=x'),
        ('gym/CartPole-v1', 'frames=4'),
    ],
)
def test_every_family_refuses_what_it_does_not_know(name, text):
    make = host.make if name.startswith('gym/') else device.make
    with pytest.raises(UserError, match='expected'):
        make(name, **options_of([text]))


def test_a_word_for_no_switches_off():
    env = device.make('minatar/asterix', **options_of(['ramping=false', 'minimal_actions=yes']))
    assert env.game.ramping is False and env.spec.actions.size < 6
