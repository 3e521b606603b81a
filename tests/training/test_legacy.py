"""Runs of older versions, in miniature: what is renamed, and what is gone."""

import contextlib
import dataclasses

import pytest
from test_runner import same, train
from toy_agent import Crash, FailingStream, Stream, Toy, toy

from reverie.training import legacy
from reverie.types import UserError


@dataclasses.dataclass(frozen=True)
class Older(Toy):
    """The toy with one more group and a last phase of its own for it."""

    def init(self, key):
        params = super().init(key)
        return {**params, 'bc': params['head']}


def older():
    agent = toy()
    head = agent.phases[1]

    def loss(params, *args):
        return head.loss({**params, 'head': params['bc']}, *args)

    last = dataclasses.replace(head, name='bc', trains=('bc',), loss=loss, begin=None)
    return Older((*agent.phases, last))


def stopped(folder, calls):
    """A run of the older toy that fails at a call for batches, if it is not finished before."""
    source = FailingStream()
    source.calls = calls
    config = dict(config=dict(bc_phase=dict(steps=10)))
    with contextlib.suppress(Crash):
        train(folder, older(), source, seeds=2, checkpoint_every_s=0.0, config=config)


@pytest.mark.parametrize('calls', [4, 8, 0])
def test_a_run_goes_on_without_the_phase_and_the_group_that_are_gone(tmp_path, calls):
    """Stopped in each phase before, and finished."""
    new = dict(seeds=2, config=dict(config={}))
    stopped(tmp_path / 'a', calls)
    whole = train(tmp_path / 'whole', source=Stream(), **new)
    assert same(train(tmp_path / 'a', source=Stream(), **new), whole)


def test_a_run_that_stands_in_a_phase_that_is_gone_says_who_finishes_it(tmp_path):
    stopped(tmp_path, 13)
    with pytest.raises(UserError, match=r'stands in phase bc.* version 0\.1'):
        train(tmp_path, source=Stream(), seeds=2, config=dict(config={}))


@pytest.mark.parametrize('text', ['{"a": 1', '[]', '\x00'])
def test_a_config_that_is_none_is_refused_in_one_line(tmp_path, text):
    with pytest.raises(UserError, match=r'not a run folder, expected a config\.json'):
        legacy.read_config(tmp_path)
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(UserError, match=r'config\.json .*expected the config of a run'):
        legacy.read_config(tmp_path)
