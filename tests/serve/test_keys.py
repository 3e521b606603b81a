"""Keys of actions, and of the parts of composite ones."""

import importlib.resources
import re

import jax.numpy as jnp
import numpy as np
import pytest

from reverie.serve import keys
from reverie.types import ActionSpace, Component
from tests.serve.fake import WALKER


def test_keys_come_from_the_names_of_actions_and_never_collide():
    names = ('noop', 'fire', 'up', 'upleft', 'upleftfire', 'move_left', 'place_stone', 'do', 'left')
    found = keys.bindings(ActionSpace('discrete', len(names), names))
    chords = [frozenset(c) for b in found for c in b.chords]
    assert len(chords) == len(set(chords)) and not found[0].chords
    assert ('ArrowUp', 'ArrowLeft') in found[3].chords and ('ArrowUp', 'ArrowLeft', 'x') in found[
        4
    ].chords
    assert ('ArrowLeft',) in found[5].chords  # the first of two lefts
    assert len(found[6].chords) == 1 and len(found[8].chords) == 1
    assert not set('mrbg.[] -=') & {key for chord in chords for key in chord}
    assert keys.rest(ActionSpace('discrete', 3, ('left', 'NOOP', 'right'))) == 1
    assert keys.rest(ActionSpace('discrete', 2, ('left', 'right'))) is None
    many = keys.bindings(ActionSpace('discrete', 60))
    assert len({b.chords for b in many if b.chords}) == sum(bool(b.chords) for b in many) > 25
    pair = keys.bindings(ActionSpace('continuous', 2, ('x', 'y')))
    assert [b.action for b in pair] == [(-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0)]


def held(*parts: Component) -> dict[tuple[int, float], tuple[str, ...]]:
    """Return {(part, value): keys}; no key stands for two values, or is the page's."""
    found = keys.bindings(ActionSpace.composite(parts))
    pressed = [key for binding in found for (key,) in binding.chords]
    assert len(pressed) == len(set(pressed)) and not keys.PAGE & set(pressed)
    return {(b.part, b.action): tuple(key for (key,) in b.chords) for b in found}


def test_parts_without_keys_get_those_of_their_names_and_the_camera_the_arrows():
    strafe = Component('strafe', ('left', 'none', 'right'), rest=1.0)
    found = held(strafe, *WALKER.parts)
    assert found[0, 0] == ('a',) and found[0, 2] == ('d',)
    assert found[1, 2] == ('w',) and found[1, 0] == ('s',)
    assert found[2, 1] == ('ArrowLeft',) and found[2, 5] == ('ArrowRight',)
    assert found[2, 0] == found[2, 6] == ()  # the mouse has the others
    assert found[3, 1] == ('x', 'Enter')
    assert found[4, -2.0] == ('ArrowUp',) and found[4, 4.0] == ('ArrowDown',)
    assert (0, 1) not in found and (2, 3) not in found and (3, 0) not in found


def test_declared_keys_are_kept_but_for_those_of_the_page_and_of_parts_before():
    jump = Component('jump', ('0', '1'), keys=((), (' ', 'J')))
    run = Component('run', ('0', '1'), keys=((), ('j', 'Shift')))
    lean = Component('lean', (), -1.0, 1.0, keys=(('q',), ('e',)))
    found = held(jump, run, lean, Component('use', ('0', '1')))
    assert found == {
        (0, 1): ('j',), (1, 1): ('Shift',), (2, -1.0): ('q',), (2, 1.0): ('e',), (3, 1): ('x',)
    }  # fmt: skip
    only = held(Component('jump', ('0', '1'), keys=((), (' ',))))
    assert only == {(0, 1): ('x', 'Enter')}  # as if it had declared none


def test_a_choice_at_rest_has_a_key_only_if_it_declares_one():
    gear = Component('gear', ('low', 'high'), rest=1.0, keys=(('1',), ('2',)))
    assert held(gear) == {(0, 0): ('1',), (0, 1): ('2',)}


def test_many_parts_run_out_of_keys_without_a_clash():
    found = held(*(Component(f'switch {i}', ('0', '1')) for i in range(60)))
    assert 25 < sum(bool(k) for k in found.values()) < 60
    found = held(*(Component(f'axis {i}') for i in range(9)))
    assert found[0, -1.0] == ('ArrowLeft',) and found[1, 1.0] == ('ArrowUp',)


def test_video_without_actions_has_no_keys_and_one_column_that_stays_zero():
    space = ActionSpace.composite(())
    assert keys.bindings(space) == () and keys.rest(space) == ()
    assert keys.vector(space, ()) == (0.0,) and keys.plain_parts(space) == []


@pytest.mark.parametrize(
    'values', [(1.0, 3.0, 0.0, 1.0), (2.0, 0.0, 1.0, -2.0), (0.0, 6.0, 0.0, 4.0)]
)
def test_vectors_are_those_of_the_space(values):
    stored = [p.stored(v) for p, v in zip(WALKER.parts, values, strict=True)]
    np.testing.assert_allclose(
        keys.vector(WALKER, values), WALKER.vector(jnp.array(stored)), atol=1e-6
    )
    assert keys.rest(WALKER) == (1, 3, 0, 1.0)
    starts = [part['at'] for part in keys.plain_parts(WALKER)]
    assert starts == [0, 3, 10, 12] and WALKER.size == 13


def test_a_rest_out_of_range_is_brought_into_it():
    parts = (Component('a', ('0', '1'), rest=9.0), Component('b', (), 2.0, 3.0))
    assert keys.rest(ActionSpace.composite(parts)) == (1, 2.0)


def test_the_keys_of_the_page_are_those_that_its_script_takes():
    script = importlib.resources.files('reverie.serve').joinpath('controls.js').read_text()
    (table,) = re.findall(r'const shortcuts = \{(.*?)\};', script, re.DOTALL)
    taken = {a or b for a, b in re.findall(r"(?:'([^']+)'|(\w+)): '", table)}
    assert {key.lower() if len(key) == 1 else key for key in taken} <= keys.PAGE
    assert not set(keys.FREE) & keys.PAGE
