"""Several datasets as one source."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from reverie.data import Episodes, Mixture, Resident, Streaming, Writer, open_mixture
from reverie.data.mixture import apportion, common_spec
from reverie.types import ActionSpace, EnvSpec, Step, UserError

T = 6
WIDE = EnvSpec('toy', (2, 2, 3), ActionSpace('discrete', 3, tuple('abc')))
VIDEO = dataclasses.replace(WIDE, name='film', actions=ActionSpace.composite(()))


def write(path, shade, spec=WIDE, task='', seed=0, dtype=np.uint8):
    """Forty episodes whose frames all have one shade, which tells the dataset; every fifth step
    pays."""
    rng = np.random.default_rng(seed)
    with Writer(path, spec, task=task) as writer:
        for i in range(40):
            t = int(rng.integers(5, 20))
            first, last = np.arange(t) == 0, np.arange(t) == t - 1
            obs = np.full((t, *spec.obs_shape), shade, dtype)
            action = rng.integers(0, 3, t) if spec.actions.kind == 'discrete' else np.zeros((t, 0))
            reward = (np.arange(t) % 5 == 4).astype(np.float32)
            acted = spec.actions.kind == 'discrete'
            writer.add(
                'any', Step(obs, action, reward, first, last, last), has_action=acted,
                has_reward=acted, held_out=i == 3,
            )  # fmt: skip
    return path


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('mixture')
    write(path / 'left', 50, task='left')
    write(path / 'right', 100, task='right', seed=1)
    write(path / 'left_again', 150, task='left', seed=2)
    write(path / 'film', 200, VIDEO, seed=3)
    return path


def mixture(folder, names, weights=(), kinds=('resident', 'resident', 'resident', 'resident')):
    sets = [Episodes(folder / name, part='train') for name in names]
    make = {
        'resident': Resident,
        'streaming': lambda e: Streaming(e, group_bytes=80 * e.bytes_per_frame),
    }
    parts = [make[kind](episodes) for kind, episodes in zip(kinds, sets, strict=False)]
    return Mixture(parts, common_spec(sets), tuple(map(float, weights)))


def draw(source, batch=12, relevant=0.5, updates=1, first=0):
    """Batches of one `load`, as NumPy, with the keys of update `first` and those after it."""
    loaded = source.load(updates, batch, T, 1, relevant)
    one = jax.jit(lambda data, x, key: source.draw(data, x, key, batch, T, relevant))
    return [
        jax.device_get(
            one(
                source.data,
                jax.tree.map(lambda x, i=i: x[i, 0], loaded),
                jax.random.fold_in(jax.random.key(0), first + i),
            )
        )
        for i in range(updates)
    ]


def shades(batch):
    return batch.step.obs[:, 0, 0, 0, 0]


@pytest.mark.parametrize('kind', ['resident', 'streaming'])
def test_rows_are_split_by_weight_and_both_sorts_alike(folder, kind):
    source = mixture(folder, ['left', 'right'], (3, 1), (kind, 'resident'))
    (batch,) = draw(source, batch=16)
    assert (batch.relevant == (np.arange(16) < 8)).all()
    for rows in (slice(0, 8), slice(8, 16)):
        assert (shades(batch)[rows] == 50).sum() == 6 and (shades(batch)[rows] == 100).sum() == 2
    assert (batch.step.reward[:8].max(1) == 1).all()
    # and any run of rows is mixed, for losses that treat the first ones in their own way
    assert (shades(batch)[8:12] == 50).sum() == 3


def test_rows_tell_the_task_of_their_dataset_and_datasets_share_one(folder):
    source = mixture(folder, ['left', 'right', 'left_again'])
    assert source.spec.tasks == ('left', 'right')
    (batch,) = draw(source)
    np.testing.assert_array_equal(batch.task, shades(batch) == 100)
    for shade in (50, 100, 150):
        mine = shades(batch) == shade
        assert mine.sum() == 4 and batch.relevant[mine].sum() == 2
    alone = mixture(folder, ['left', 'left_again'])
    assert alone.spec.tasks == () and draw(alone)[0].task is None


def test_video_without_actions_counts_as_unlabelled_in_the_others_space(folder):
    source = mixture(folder, ['film', 'left'])
    assert source.spec.actions == WIDE.actions and source.spec.tasks == ()
    (batch,) = draw(source)
    film = shades(batch) == 200
    assert film.sum() == 3 and not batch.relevant[film].any()  # a policy learns nothing from it
    np.testing.assert_array_equal(batch.has_action, ~film)
    assert batch.step.prev_action.shape == (12, T, 3)
    assert (batch.step.prev_action[film] == 0).all()
    assert (batch.step.prev_action[~film].sum(-1) == 1).any()


def test_a_restored_mixture_goes_on_bit_for_bit(folder):
    make = lambda: mixture(
        folder, ['left', 'right', 'film'], (2, 1, 1), ('streaming', 'resident', 'streaming')
    )
    whole = draw(make(), updates=30)
    first = make()
    draw(first, updates=17)
    second = make()
    second.set_state(json.loads(json.dumps(first.get_state())))
    rest = draw(second, updates=13, first=17)
    for a, b in zip(jax.tree.leaves(whole[17:]), jax.tree.leaves(rest), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match='data state has dataset'):
        mixture(folder, ['left', 'right']).set_state(first.get_state())


@pytest.mark.parametrize(
    'spec, dtype, said',
    [
        (dataclasses.replace(WIDE, obs_shape=(3, 2, 3)), np.uint8, r'uint8\[3, 2, 3\], expected'),
        (WIDE, np.float32, r'float32\[2, 2, 3\], expected uint8\[2, 2, 3\] as in'),
        (
            dataclasses.replace(WIDE, actions=ActionSpace('discrete', 4)),
            np.uint8,
            'actions are discrete of size 4, expected discrete of size 3',
        ),
        (
            dataclasses.replace(WIDE, actions=ActionSpace('discrete', 3, tuple('xyz'))),
            np.uint8,
            r'actions are discrete of size 3 \(x, y, z\)',
        ),
    ],
)
def test_datasets_that_differ_are_refused_in_one_line(folder, tmp_path, spec, dtype, said):
    other = Episodes(write(tmp_path / 'other', 1, spec, dtype=dtype))
    with pytest.raises(UserError, match=said) as found:
        common_spec([Episodes(folder / 'left'), other])
    assert '\n' not in str(found.value)


@pytest.mark.parametrize('weights', [(1,), (1, 2, 3), (1, -1), (1, 0), (1, float('nan'))])
def test_weights_of_the_wrong_number_or_sign_are_refused(folder, weights):
    with pytest.raises(UserError, match='expected 2 positive numbers, one of each dataset'):
        mixture(folder, ['left', 'right'], weights)


def test_a_batch_with_too_few_rows_for_all_datasets_is_refused_before_training(folder):
    source = mixture(folder, ['left', 'right', 'left_again'])
    with pytest.raises(UserError, match='4 has 2 relevant rows, expected at least 3'):
        source.check({}, 4, T, 1, 0.5)
    with pytest.raises(UserError, match='2 has 2 uniform rows'):
        source.check({}, 2, T, 1)
    source.check({}, 3, T, 1, 1.0)


def test_apportioned_rows_are_whole_and_each_dataset_has_one():
    assert apportion(10, np.array([0.5, 0.5])) == [5, 5]
    assert apportion(7, np.array([0.6, 0.3, 0.1])) == [4, 2, 1]
    assert apportion(8, np.array([0.98, 0.01, 0.01])) == [6, 1, 1]
    assert apportion(0, np.array([0.5, 0.5])) == [0, 0]
    for count in range(3, 40):
        assert sum(apportion(count, np.array([0.7, 0.2, 0.1]))) == count


def test_one_budget_is_for_all_datasets(folder):
    sets = [Episodes(folder / name) for name in ('left', 'right', 'film')]
    total = sum(episodes.total_bytes for episodes in sets)
    kinds = lambda budget: [
        type(part).__name__ for part in open_mixture(sets, common_spec(sets), (), budget).parts
    ]
    assert kinds(total) == ['Resident'] * 3
    assert kinds(total - 1).count('Streaming') == 1
    assert kinds(total // 4) == ['Streaming'] * 3
