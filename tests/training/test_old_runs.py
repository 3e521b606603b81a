"""Runs of the version before (27e5a6c), kept in tests/golden/runs-1.tar.xz, go on with this one.

`dreamer4` was stopped by SIGTERM after 3 of 4 updates of its dynamics, `dreamer_v3` after 2 of 4.
`expected.npz` holds the weights that the old code had at the end of that phase.
"""

import dataclasses
import os
import pathlib
import signal
import tarfile

import jax
import numpy as np
import pytest

from reverie.commands.experiment import describe
from reverie.evaluation.results import provenance
from reverie.report.run import read
from reverie.training import checkpoint, metrics, run_folder, warm

pytestmark = pytest.mark.whole

RUNS = pathlib.Path(__file__).parents[1] / 'golden' / 'runs-1.tar.xz'


@pytest.fixture
def old(tmp_path):
    with tarfile.open(RUNS) as archive:
        archive.extractall(tmp_path, filter='data')
    return tmp_path


def opened(folder):
    """The run as an experiment; its dataset, if it has one, lies beside it."""
    here = pathlib.Path.cwd()
    try:
        os.chdir(folder.parent)  # the dataset's path is relative
        experiment = describe(folder)
        experiment.agent  # noqa: B018
    finally:
        os.chdir(here)
    if hasattr(experiment, 'data'):
        return dataclasses.replace(experiment, data=(folder.parent / 'data',))
    return experiment


ROUNDING = 1e-6  # of a tensor's largest weight, after two updates in fp32


def check(folder, steps, exact):
    """The newest checkpoint holds the old code's weights. Where that ran on such a device with
    these versions: to the bit if `exact`, else within ROUNDING; elsewhere nearly.
    """
    params, meta = checkpoint.load(folder)
    assert meta['step'] == steps and meta['complete']
    found = {
        '/'.join(str(checkpoint.key_name(k)) for k in path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    config = read(folder).config
    told = provenance()
    same = all(config[name] == told[name] for name in ('device', 'versions'))
    with np.load(folder / 'expected.npz', allow_pickle=False) as expected:
        assert set(expected) <= set(found)
        for name, x in expected.items():
            if same and not exact:
                scale = np.abs(x).max()
                np.testing.assert_allclose(found[name], x, 0, ROUNDING * scale, err_msg=name)
            elif same:
                np.testing.assert_array_equal(found[name], x, err_msg=name)
            else:
                np.testing.assert_allclose(found[name], x, 1e-3, 1e-5, err_msg=name)


def test_an_old_dreamer_v3_goes_on_with_its_ring_and_ends_as_it_would_have(old):
    folder = old / 'dreamer_v3'
    opened(folder).train(folder, updates_per_call=1, log_every_s=0.0)
    check(folder, 4, exact=False)  # loops of recurrent models round otherwise now
    steps = [r['step'] for r in metrics.read(folder / 'metrics.jsonl')]
    assert steps == [1, 2, 3, 4]


def test_an_old_dreamer4_goes_on_in_the_middle_of_its_dynamics(old, monkeypatch):
    folder, write = old / 'dreamer4', metrics.Jsonl.write

    def stop(sink, record):
        write(sink, record)
        if (record['phase'], record['step']) == ('dynamics', 4):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(metrics.Jsonl, 'write', stop)
    with pytest.raises(SystemExit, match='75'):
        opened(folder).train(folder, updates_per_call=1, log_every_s=0.0)
    check(folder, 4, exact=True)


def test_phases_of_an_old_run_can_be_taken(old):
    experiment = opened(old / 'dreamer4')
    agent = experiment.agent
    config = run_folder.fingerprint(agent.phases, experiment.describe(), 0, 1)
    start = warm.plan(warm.Init(old / 'dreamer4', ('tokenizer',)), agent, config)
    assert set(start.found) == {'encoder', 'decoder'} and not start.record['differs']
