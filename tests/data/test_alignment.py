"""The check that actions stand beside the frames that they led to."""

import dataclasses

import numpy as np
import pytest
from footage import counter, held, texture, walk_about

from reverie.data.alignment import Alignment
from reverie.data.motion import as_pictures, count_cuts, count_repeated, shift
from reverie.data.records import Schema, from_step
from reverie.types import ActionSpace, Component, Step

TURN = Component('turn', ('hard left', 'left', 'none', 'right', 'hard right'), rest=2.0, camera='x')
PITCH = Component('pitch', (), -4.0, 4.0, camera='y')
WALK = Component('walk', ('none', 'forward'))
FIRE = Component('fire', ('none', 'fire'))


def verdict(space: ActionSpace, episodes, late: int = 0):
    """Result for episodes (obs, action [T, ...]) whose actions are stored `late` frames late."""
    schema = Schema(episodes[0][0].shape[1:], episodes[0][0].dtype.name, space)
    check = Alignment(schema, len(episodes))
    for obs, action in episodes:
        place = np.arange(len(obs))
        action = np.roll(action, late, 0)
        step = Step(obs, action, np.zeros(len(obs)), place == 0, place == len(obs) - 1, place < 0)
        check.add(from_step('test', step, schema, False))
    found = check.verdict()
    assert found is not None
    return found


@pytest.mark.parametrize('late', [-2, -1, 0, 1, 2])
@pytest.mark.parametrize('parts', [(TURN,), (TURN, PITCH)])
def test_turns_are_found_at_their_shift(late, parts):
    space = ActionSpace.composite(parts)
    episodes = [walk_about(300, seed) for seed in range(3)]
    episodes = [(obs, action[:, : len(parts)]) for obs, action in episodes]
    found = verdict(space, episodes, late)
    assert found.shift == -late, found
    assert found.scores[-late] > 0.8
    if late == 0:
        assert found.line.startswith('actions move the picture')
    if late == 1:
        assert 'actions look shifted by one: they fit best one frame earlier (turn' in found.line
    if late == -1:
        assert 'actions look shifted by one: they fit best one frame later (turn' in found.line


def test_turns_that_move_nothing_or_are_few_decide_nothing():
    space = ActionSpace.composite((TURN,))
    obs, action = walk_about(2000, 0)
    rng = np.random.default_rng(1)
    other = action[rng.permutation(len(action)), :1]
    found = verdict(space, [(obs, other)])
    assert found.shift is None and found.line.startswith('cannot tell')
    assert verdict(space, [(obs[:100], action[:100, :1])]).shift is None
    still = np.zeros_like(obs)
    assert verdict(space, [(still, action[:, :1])]).shift is None


@pytest.mark.parametrize('late', [-1, 0, 1])
@pytest.mark.parametrize('kind', ['discrete', 'continuous'])
def test_a_picture_that_follows_the_action_at_once_names_the_shift(late, kind):
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(4):
        action = rng.integers(0, 3, 200)
        place = 4 + np.abs(np.cumsum(action - 1) % 32 - 16)  # to and fro
        action = np.concatenate([[1], 1 + np.diff(place)])
        obs = np.zeros((200, 24, 24, 1), np.uint8)
        obs[np.arange(200), 20, place] = 255
        stored = action if kind == 'discrete' else (action[:, None] - 1).astype(np.float32)
        episodes.append((obs, stored))
    space = ActionSpace(kind, 3 if kind == 'discrete' else 1)
    found = verdict(space, episodes, late)
    assert found.shift == -late, found


@pytest.mark.parametrize('late', [-1, 0, 1])
def test_the_counter_names_the_shift(late):
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(10):
        action = rng.integers(0, 2, 60)
        episodes.append((counter(action[1:], (8, 8)), action))
    assert verdict(ActionSpace('discrete', 2), episodes, late).shift == -late


@pytest.mark.parametrize('seed', range(4))
def test_buttons_that_lead_and_lag_raise_no_alarm(seed):
    """A walker keeps walking, a gun flashes two frames after its key, both keys are held, and the
    player fires at what comes into sight.
    """
    rng = np.random.default_rng(seed)
    length = 3000
    walk = held(rng, length, 2, 8)
    seen = rng.random(length) < 0.02  # something appears
    fire = held(rng, length, 2, 4) | np.roll(np.convolve(seen, np.ones(3))[:length] > 0, 2)
    speed = np.zeros(length)
    for t in range(1, length):
        speed[t] = 0.8 * speed[t - 1] + 0.4 * walk[t]
    world = texture(rng, 16, 4096)
    place = np.cumsum(speed).astype(int) % 4000
    obs = np.stack([world[:, x : x + 16] for x in place])
    obs[:, 10:, 6:10] += np.roll(fire, 2)[:, None, None] * 0.5
    obs[:, :4, :4] += np.convolve(seen, np.ones(6))[:length][:, None, None] * 0.5
    obs = (np.clip(obs, 0, 1) * 255).astype(np.uint8)[..., None]
    space = ActionSpace.composite((WALK, FIRE))
    found = verdict(space, [(obs, np.stack([walk, fire], 1))])
    assert found.shift in (0, None), found


def test_a_dataset_without_actions_has_no_verdict():
    obs, action = walk_about(100, 0)
    schema = Schema(obs.shape[1:], 'uint8', ActionSpace.composite((TURN,)))
    place = np.arange(100)
    step = Step(obs, action[:, :1], np.zeros(100), place == 0, place == 99, place < 0)
    check = Alignment(schema, 1)
    record = from_step('test', step, schema, False)
    check.add(dataclasses.replace(record, has_action=False))
    assert check.verdict() is None
    assert Alignment(Schema((8, 8, 3), 'uint8', ActionSpace.composite(())), 1).verdict() is None


def test_shift_is_positive_to_the_right_and_down():
    obs, action = walk_about(200, 3)
    grey = as_pictures(obs).mean(-1)
    for axis, true in ((2, action[1:, 0] - 2), (1, action[1:, 1] * 4)):
        assert np.corrcoef(shift(grey, axis), true)[0, 1] > 0.8


def test_pictures_are_averaged_down():
    obs = np.zeros((2, 130, 64, 3), np.uint8)
    obs[:, :65] = 255
    small = as_pictures(obs)
    assert small.shape == (2, 64, 64, 3) and small.dtype == np.float32
    np.testing.assert_allclose(small[:, :31], 1)
    np.testing.assert_allclose(small[:, 33:], 0)
    flags = np.zeros((2, 10, 10, 4), bool)
    assert as_pictures(flags).max() == 0


def test_cuts_and_repeated_frames_are_counted():
    rng = np.random.default_rng(0)
    scenes = [texture(rng, 16, 16) for _ in range(3)]
    grey = np.concatenate([np.repeat(scene[None], 20, 0) for scene in scenes])
    noisy = grey + rng.normal(0, 0.002, grey.shape)
    assert count_cuts(noisy[..., None]) == 2 and count_repeated(noisy) == 0
    assert count_repeated(grey) == 57 and count_cuts(grey[:1, ..., None]) == 0
    assert count_cuts(rng.random((50, 16, 16, 1))) == 0  # all frames differ: noise, no cuts
