"""Labels: which episodes, files and stretches keep their actions, and what becomes of the others."""

import dataclasses

import jax
import numpy as np
import pytest

from reverie.data import Episodes, Resident, Streaming, Writer
from reverie.data.labels import Labels
from reverie.data.windows import HAS_ACTION
from reverie.types import UserError

FILES = ('E1M4.mp4', 'E1M4_mirrored.mp4', 'MAP02.mp4')
LENGTHS = (100, 100, 40)


@pytest.fixture(scope='module')
def imported(tmp_path_factory, world):
    """Three episodes of a file each."""
    path = tmp_path_factory.mktemp('data') / 'imported'
    rng = np.random.default_rng(0)
    with Writer(path, world.SPEC, provenance={'files': list(FILES)}) as writer:
        for i, length in enumerate(LENGTHS):
            writer.add('x', world.episode(i, length, rng))
    return Episodes(path)


def kept(imported, labels):
    """Mask of the frames of each episode whose actions are used."""
    chosen = labels.chosen(imported)
    found = []
    for i, record in imported.numbered():
        part = labels.of(record, imported, bool(chosen[i]))
        shown = (
            np.broadcast_to(part.has_action, len(part)) if part.labelled is None else part.labelled
        )
        first = np.arange(len(part)) == 0
        np.testing.assert_array_equal(part.action >= 0, shown & ~first)
        np.testing.assert_array_equal(part.obs, record.obs)
        found.append(shown)
    return found


def test_files_are_named_with_or_without_suffix(imported):
    for names in (('E1M4', 'MAP02'), ('E1M4.mp4', 'MAP02.mp4')):
        shown = kept(imported, Labels(files=names))
        assert [x.all() for x in shown] == [True, False, True] and not shown[1].any()


def test_stretches_are_whole_and_spread_over_each_episode(imported):
    shown = kept(imported, Labels(0.3, stretch=5))
    for mask, length in zip(shown, LENGTHS, strict=True):
        pieces = mask.reshape(-1, 5)
        assert (pieces.all(1) | ~pieces.any(1)).all()
        assert pieces.any(1).sum() == round(0.3 * length / 5)
        halves = [half.sum() for half in np.split(mask, 2)]
        assert abs(halves[0] - halves[1]) <= 5
    np.testing.assert_array_equal(shown[0], shown[1])  # a recording and its mirrored copy
    assert Labels(0.3, stretch=5).frames(imported) == sum(x.sum() for x in shown)


def test_nothing_and_everything(imported):
    for labels, share in (
        (Labels(0.0, stretch=5), 0),
        (Labels(1.0, stretch=5), 1),
        (Labels(0.0), 0),
    ):
        assert np.concatenate(kept(imported, labels)).mean() == share
        assert labels.frames(imported) == share * sum(LENGTHS)


@pytest.mark.parametrize('kind', [Resident, Streaming])
def test_a_window_has_labels_if_all_of_its_frames_have(imported, world, kind):
    labels = Labels(0.3, stretch=10)
    source = kind(imported, labels=labels)
    loaded = jax.tree.map(lambda x: x[0, 0], source.load(1, 256, 4, 1))
    batch = source.draw(source.data, loaded, jax.random.key(0), 256, 4)
    count, number = world.read_frame(np.asarray(batch.step.obs))
    shown = kept(imported, labels)
    assert 0.05 < batch.has_action.mean() < 0.4
    for row in range(256):
        actions = np.asarray(batch.step.prev_action[row])
        assert batch.has_action[row] or not actions.any()
        if batch.has_action[row] and len(set(number[row])) == 1 and count[row, 0] > 0:
            np.testing.assert_array_equal(actions[1:].argmax(-1), np.diff(count[row]))
    if kind is Resident:
        flags = np.asarray(source.data['stream'].flags)
        assert ((flags & HAS_ACTION) > 0).sum() == sum(x.sum() for x in shown)


def test_files_that_are_held_out_are_no_labels_to_train_on(imported):
    imported.held_out = frozenset([2])
    try:
        with pytest.raises(UserError, match='--labelled-files MAP02: held out'):
            Labels(files=('MAP02',)).chosen(imported)
        assert Labels(files=('MAP02', 'E1M4')).chosen(imported).tolist() == [True, False, True]
    finally:
        imported.held_out = frozenset()


def test_what_cannot_be_chosen_is_refused(imported, dataset):
    with pytest.raises(
        UserError, match='--labelled-files MAP10: no such file, expected some of E1M4'
    ):
        Labels(files=('MAP10',)).chosen(imported)
    with pytest.raises(UserError, match='expected a dataset of `reverie data import`'):
        Labels(files=('E1M4',)).chosen(Episodes(dataset))
    with pytest.raises(UserError, match='expected one of both'):
        Labels(0.5, files=('E1M4',))
    with pytest.raises(UserError, match='label_stretch is -1'):
        dataclasses.replace(Labels(), stretch=-1)
