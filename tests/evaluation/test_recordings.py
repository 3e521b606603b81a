"""Dreams beside recordings: a world that is a panorama, and models that follow the camera or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from reverie.data import Episodes, Writer
from reverie.evaluation import recordings
from reverie.evaluation.recordings import HORIZON, acted, measure, paired, windows
from reverie.types import ActionSpace, Component, EnvSpec, Prediction, Step, UserError

SIDE, WIDE, CONTEXT, SPEED = 32, 256, 4, 3
TURN = Component('turn', ('left', 'none', 'right'), rest=1.0, camera='x')
SPACE = ActionSpace.composite([TURN, Component('fire', ('no', 'yes'))])
rng = np.random.default_rng(0)
PANORAMA = np.repeat(np.repeat(rng.integers(0, 256, (8, WIDE // 4, 3), np.uint8), 4, 0), 4, 1)


def view(angle):
    """The panorama [32, 32, 3] as it is seen at an angle."""
    return jnp.roll(jnp.asarray(PANORAMA), -angle, 1)[:, :SIDE] / 255


class Panorama:
    """A world model that sees the angle in the frame's own place, and turns by `speed` a step.

    The state is the angle [N], which the test writes into the first pixel of each frame.
    """

    def __init__(self, speed=SPEED):
        self.speed = speed

    def initial(self, batch):
        return jnp.zeros(batch, jnp.int32)

    def observe(self, state, step, key):
        angle = step.obs[:, 0, 0, 0].astype(jnp.int32)
        return angle, jnp.zeros((len(angle), 1))

    def imagine(self, state, action, key):
        turn = action[:, 2] - action[:, 0]
        state = (state + self.speed * turn.astype(jnp.int32)) % WIDE
        n = len(state)
        return state, Prediction(jnp.zeros((n, 1)), jnp.zeros(n), jnp.ones(n))

    def decode(self, state):
        image = jax.vmap(view)(state)
        return image.at[:, 0, 0, 0].set(state / 255)


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'd'
    with Writer(path, EnvSpec('panorama', (SIDE, SIDE, 3), SPACE), compressed=True) as writer:
        for length in (200, 9, 150):
            action = np.stack([rng.integers(0, 3, length), rng.integers(0, 2, length)], 1)
            angle = np.cumsum(np.where(np.arange(length) > 0, action[:, 0] - 1, 0) * SPEED) % WIDE
            obs = np.round(255 * np.asarray(jax.vmap(view)(jnp.asarray(angle)))).astype(np.uint8)
            obs[:, 0, 0, 0] = angle
            first, last = np.arange(length) == 0, np.arange(length) == length - 1
            step = Step(obs, action, np.zeros(length), first, last, np.zeros(length, bool))
            writer.add('human', step, has_reward=False)
    return path


def measured(dataset, model, **options):
    episodes = Episodes(dataset)
    cut = windows(episodes, CONTEXT, 10.0)
    key = jax.random.key(0)
    return measure(lambda _: model, {}, cut, episodes.schema, CONTEXT, key, **options)


def test_a_model_that_follows_the_actions_beats_all_others_and_steers(dataset):
    found, pictures = measured(dataset, Panorama())
    assert found['true']['psnr']['mean'] > 50 and found['tokenizer']['ssim'] > 0.999
    for other in ('shuffled', 'none', 'held'):
        assert found[other]['psnr']['mean'] < 30
        difference = found['differences'][f'true - {other}']['psnr']
        assert difference['ci95'][0] > 10
    turned = found['steering']['turn']
    assert turned['right'] == turned['sign'] == 1.0 and turned['n'] == 2 * found['contexts']
    assert turned['shift'] == pytest.approx([-SPEED, SPEED], abs=0.5)
    assert set(pictures) == {'truth', 'true', 'shuffled', 'none'}
    np.testing.assert_allclose(pictures['truth'], pictures['true'], atol=1)
    assert any('100% of' in line for line in recordings.lines(found))


def test_a_model_that_ignores_the_actions_gains_nothing_by_them(dataset):
    found, _ = measured(dataset, Panorama(speed=0))
    assert found['differences']['true - shuffled']['psnr']['mean'] == 0
    assert found['true'] == found['none']
    assert found['true']['psnr']['mean'] == pytest.approx(found['held']['psnr']['mean'])
    assert found['steering']['turn']['right'] == 0


def test_a_model_that_turns_the_wrong_way_is_found_out(dataset):
    found, _ = measured(dataset, Panorama(speed=-SPEED))
    assert found['steering']['turn']['sign'] == 0


def test_windows_lie_in_blocks_of_five_seconds_of_their_recording(dataset):
    cut = windows(Episodes(dataset), CONTEXT, 10.0)
    assert cut.step.obs.shape[1] == CONTEXT + HORIZON
    assert len(cut.block) == 64 and (np.diff(cut.block) >= 0).all()
    # recordings of 200 and 150 frames in blocks of 50: starts up to 180 and 130
    assert len(np.unique(cut.block)) == 4 + 3
    with pytest.raises(UserError, match='no recording has 516 frames'):
        windows(Episodes(dataset), 500, None)


def test_only_the_dreamed_frames_have_other_actions(dataset):
    step = windows(Episodes(dataset), CONTEXT, 10.0).step
    for name in ('shuffled', 'none'):
        changed = acted(step, name, CONTEXT).prev_action
        np.testing.assert_array_equal(changed[:, :CONTEXT], step.prev_action[:, :CONTEXT])
        assert (changed[:, CONTEXT:] != step.prev_action[:, CONTEXT:]).any()
    assert not acted(step, 'none', CONTEXT).prev_action[:, CONTEXT:].any()


def test_the_interval_is_that_of_the_means_of_the_blocks():
    block = np.repeat(np.arange(6), 4)
    difference = np.random.default_rng(1).normal(size=(24, 5)) + block[:, None]
    found = paired(difference, block)
    means = difference.mean(1).reshape(6, 4).mean(1)
    ours = scipy.stats.ttest_1samp(means, 0.0).confidence_interval()
    assert found['n'] == 6
    assert found['ci95'] == pytest.approx([ours.low, ours.high])


def test_lpips_is_taken_of_every_dreamed_frame(dataset):
    sizes = []

    def distance(a, b):
        sizes.append(a.shape)
        return np.abs(a - b).mean((1, 2, 3))

    found, _ = measured(dataset, Panorama(), distance=distance)
    assert found['true']['lpips']['mean'] < found['shuffled']['lpips']['mean']
    assert (64 * HORIZON, SIDE, SIDE, 3) in sizes
