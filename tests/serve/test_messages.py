"""Orders of pages: composite actions, and whatever else may stand in their place."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.serve.messages import Act, Choices, MalformedMessageError, Set, parse
from reverie.types import ActionSpace
from tests.serve.fake import WALKER

EXAMPLES = int(os.environ.get('REVERIE_FUZZ', '100'))  # of each fuzzed property
ALLOWED = Choices(WALKER, ('dream',), (1, 2), ('data',), False)
GOOD = [2, 0, 1, 2.5]


def act(action, allowed=ALLOWED):
    return parse(json.dumps({'type': 'act', 'action': action, 'id': 3}), allowed)


def test_one_value_per_part_becomes_the_vector():
    expected = [0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0.5]
    assert act(GOOD) == Act(tuple(map(float, expected)), 3)
    assert act([1, 3, 0, 4]).action[-1] == 1.0 and act([1, 3, 0, -2]).action[-1] == -1.0


def test_video_without_actions_takes_an_empty_list():
    none = Choices(ActionSpace.composite(()), ('dream',), (), ('data',), False)
    assert act([], none).action == (0.0,)
    for bad in ([0], 0, None, {}):
        with pytest.raises(MalformedMessageError):
            act(bad, none)


@pytest.mark.parametrize(
    'i, value',
    [
        *((i, value) for i in range(4) for value in (True, None, '1', [1], {}, 10**400, -(10**400))),
        (0, 3), (0, -1), (0, 1.0), (1, 7), (2, 0.5), (3, 4.01), (3, -2.01), (3, 1e300),
    ],
)  # fmt: skip
def test_a_bad_value_of_any_part_is_refused(i, value):
    with pytest.raises(MalformedMessageError, match='action: expected') as error:
        act([*GOOD[:i], value, *GOOD[i + 1 :]])
    assert len(str(error.value)) < 100 and '\n' not in str(error.value)


@pytest.mark.parametrize('number', ['NaN', 'Infinity', '-Infinity', '1e999', '9' * 3000])
def test_numbers_that_are_none_are_refused(number):
    with pytest.raises(MalformedMessageError):
        parse(f'{{"type": "act", "action": [2, 0, 1, {number}], "id": 3}}', ALLOWED)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
near = st.tuples(*(st.integers(-1, 8) | st.floats(-3, 5) | values for _ in WALKER.parts)).map(list)


@settings(max_examples=EXAMPLES, deadline=None)
@given(near | st.lists(values, max_size=6) | values)
def test_whatever_stands_for_an_action_it_is_a_vector_of_the_space_or_refused(value):
    try:
        vector = np.array(act(value).action)
    except MalformedMessageError as error:
        assert '\n' not in str(error)
        return
    assert vector.shape == (WALKER.size,) and np.abs(vector).max() <= 1
    for begin, end in ((0, 3), (3, 10), (10, 12)):
        assert sorted(vector[begin:end]) == [0] * (end - begin - 1) + [1]


def test_a_model_without_a_policy_refuses_that_the_agent_plays():
    order = '{"type": "set", "field": "by_agent", "value": true}'
    with pytest.raises(MalformedMessageError, match='no policy'):
        parse(order, ALLOWED)
    can = Choices(WALKER, ('dream',), (1, 2), ('data',), True)
    assert parse(order, can) == Set('by_agent', True)
