"""Warm starts of the toy: what is taken equals what was there, the rest begins fresh, and nothing
else is accepted.
"""

import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest
from toy_agent import Crash, FailingTable, Stream, Table, head_loss, toy

from reverie.training import checkpoint, metrics, warm
from reverie.training.run import run
from reverie.training.warm import Init
from reverie.types import Phase, UserError

CONFIG = dict(config=dict(width=8, model_phase=dict(steps=1)), dataset='d')


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def train(folder, agent=None, source=None, **changes):
    arguments = dict(
        updates_per_call=5,
        log_every_s=0.0,
        checkpoint_every_s=1e9,
        config=CONFIG,
        seeds=2,
        keep_phase_ends=True,
    )
    return run(agent or three(), source or Table(), folder, **{**arguments, **changes})


def three(steps=(10, 10, 5), **changes):
    """The toy with a third phase that learns a group of its own, as a baseline does."""
    agent = toy(steps[:2], **changes)
    loss = lambda params, batch, key, step: head_loss(
        {**params, 'head': params['other']}, batch, key, step
    )

    @dataclasses.dataclass(frozen=True)
    class Three(type(agent)):
        shaped_by = {'model': ('width',), 'head': ('width',)}

        def init(self, key):
            return {**super().init(key), 'other': dict(w=jax.random.normal(key, (3,)))}

    third = Phase('other', ('other',), loss, dict(head=1.0), optax.adam(1e-2), steps[2], 4, 2)
    return Three((*agent.phases, third))


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp('source') / 'run'
    return folder, train(folder)


def config_of(folder):
    return json.loads((folder / 'config.json').read_text())


def test_an_option_says_what_is_taken(tmp_path):
    for text, phases, extend in (
        ('runs/a', (), False),
        ('runs/a:b', ('b',), False),
        ('runs/a:b+', ('b',), True),
        ('a:b+,c', ('b', 'c'), True),
        ('/x:y/a:b,c,d', ('b', 'c', 'd'), False),
    ):
        init = Init.parse(text)
        assert (init.phases, init.extend, str(init)) == (phases, extend, text)
    colon = tmp_path / 'a:b'
    colon.mkdir()
    assert Init.parse(str(colon)) == Init(colon)
    for text in ('a:', 'a:+', 'a:b,'):
        with pytest.raises(UserError, match='expected RUN, RUN:PHASE'):
            Init.parse(text)
    with pytest.raises(UserError, match='end of one phase'):
        Init.parse('a:b+', ['model'])


@pytest.mark.parametrize('stream', [Stream, Table])
def test_a_phase_trained_on_equals_one_of_all_its_updates(source, tmp_path, stream, capfd):
    """10 updates and 10 more, with an optimiser, running means of losses and of weights, and a
    reader's place.
    """
    folder = source[0]
    if stream is Stream:
        train(folder := tmp_path / 'half', source=Stream())
    straight = train(tmp_path / 'straight', three((20, 10, 5)), stream())
    warmed = train(
        tmp_path / 'warm', three((20, 10, 5)), stream(), init=Init(folder, ('model',), extend=True)
    )
    assert same(warmed, straight)
    ours, theirs = (metrics.read(tmp_path / f / 'metrics.jsonl') for f in ('warm', 'straight'))
    keep = lambda rows: [
        (r['phase'], r['step'], r['gradient_steps'], r.get('loss/fit')) for r in rows
    ]
    assert keep(ours) == keep([r for r in theirs if r['phase'] != 'model' or r['step'] > 10])
    said = capfd.readouterr().err
    assert 'model goes on after 10 of 20 updates; as all at once' in said
    assert (
        f'taken from {folder}: phases model (model) of seeds 0 1; trained afresh: head, other'
        in said
    )


def test_phases_taken_are_not_trained_and_the_others_begin_fresh_with_their_own_seed(
    source, tmp_path
):
    folder, there = source
    params = train(tmp_path / 'a', three((7, 10, 5)), init=Init(folder, ('model',)))
    assert same(params['model'], there['model'])
    assert same(
        params['other'], there['other']
    )  # the same seeds, data and updates, so the same outcome
    ends = checkpoint.steps(tmp_path / 'a' / 'checkpoints')
    assert [checkpoint.meta_of(p)['phase'] for p in ends] == ['head', 'other']
    config = config_of(tmp_path / 'a')
    assert config['phases']['model']['steps'] == 10 and config['from']['phases'] == {
        'model': config['phases']['model']
    }
    assert config['from']['groups'] == {'model': '000000010'} and config['from']['from'] is None
    rows = metrics.read(tmp_path / 'a' / 'metrics.jsonl')
    assert {r['phase'] for r in rows} == {'head', 'other'} and rows[0]['gradient_steps'] == 15


def test_a_phase_further_down_is_taken_with_a_hole_before_it(source, tmp_path):
    """Only `head` is trained; the run ends whole, and what it took in turn is found by a third run."""
    folder, there = source
    agent = three()
    params = train(tmp_path / 'a', agent, init=Init(folder, ('model', 'other')))
    assert same(params, there)
    loaded, meta = checkpoint.load(tmp_path / 'a')
    assert same(loaded, params) and meta['phase'] == 'other' and meta['complete']
    assert {r['phase'] for r in metrics.read(tmp_path / 'a' / 'metrics.jsonl')} == {'head'}
    assert same(train(tmp_path / 'a', agent, init=Init(folder, ('model', 'other'))), params)
    again = train(
        tmp_path / 'b',
        three((10, 20, 5)),
        init=Init(tmp_path / 'a', ('head', 'other'), extend=True),
    )
    assert same((again['model'], again['other']), (there['model'], there['other']))
    chain = warm.ancestors(config_of(tmp_path / 'b'))
    assert [c['run'] for c in chain] == [str(tmp_path / 'a'), str(folder)]
    assert [list(c['phases']) for c in chain] == [['model', 'other'], ['model', 'other']]


def test_groups_are_taken_alone_and_every_phase_is_trained(source, tmp_path, capfd):
    folder, there = source
    params = train(tmp_path / 'a', three((0, 0, 0)), init=Init(folder, groups=('model', 'other')))
    assert same((params['model'], params['other']), (there['model'], there['other']))
    assert not same(params['head'], there['head'])
    assert (
        'groups model, other of seeds 0 1; trained afresh: model, head, other'
        in capfd.readouterr().err
    )
    with pytest.raises(UserError, match=r"groups \['tail'\] are unknown, expected some of"):
        train(tmp_path / 'b', init=Init(folder, groups=('tail',)))
    early = train(tmp_path / 'c', three((0, 0, 0)), init=Init(folder, ('model',), groups=('head',)))
    kept = checkpoint.steps(folder / 'checkpoints')[0]
    halved = jax.tree.map(lambda x: x / 2, checkpoint.read(kept, checkpoint.meta_of(kept))['head'])
    assert same(early['head'], halved)  # the phase `head` begins from half


@pytest.mark.parametrize('calls', [1, 2, 4])
def test_an_interrupted_warm_start_continues_bit_for_bit(source, tmp_path, calls):
    """Before the first save, when the other run is read again; later it is not, it may be gone."""
    folder = tmp_path / 'source'
    shutil.copytree(source[0], folder)
    init = Init(folder, ('model',), extend=True)
    straight = train(tmp_path / 'straight', three((20, 10, 5)), init=init)
    failing = FailingTable()
    failing.calls = calls
    with pytest.raises(Crash):
        train(tmp_path / 'a', three((20, 10, 5)), failing, init=init, checkpoint_every_s=0.0)
    if calls > 1:
        shutil.rmtree(folder)
    assert same(
        train(tmp_path / 'a', three((20, 10, 5)), init=init, checkpoint_every_s=0.0), straight
    )


def test_a_run_begun_in_one_way_is_not_continued_in_another(source, tmp_path):
    folder = source[0]
    agent = three((10, 10, 0))
    train(tmp_path / 'a', agent, init=Init(folder, ('model',)))
    for init in (
        None,
        Init(folder, ('head',)),
        Init(tmp_path, ('model',)),
        Init(folder, groups=('model',)),
    ):
        with pytest.raises(
            UserError, match=r'was begun with --from .*:model, given .*use another folder'
        ) as error:
            train(tmp_path / 'a', agent, init=init)
        assert '\n' not in str(error.value)
    moved = shutil.copytree(folder, tmp_path / 'moved')
    train(tmp_path / 'a', agent, init=Init(moved, ('model',)))
    train(tmp_path / 'b', agent)
    with pytest.raises(UserError, match='was begun without --from'):
        train(tmp_path / 'b', agent, init=Init(folder, ('model',)))


def test_seeds_agree_or_one_model_is_handed_to_all(source, tmp_path, capfd):
    folder, there = source
    done = dict(agent=three((10, 0, 0)), init=Init(folder, ('model',)))
    second = train(tmp_path / 'a', **done, seed=1, seeds=1)
    assert same(second['model'], jax.tree.map(lambda x: x[1:], there['model']))
    with pytest.raises(UserError, match=r'it has the seeds \[0, 1\], not \[2\]; expected'):
        train(tmp_path / 'b', **done, seeds=3)
    assert not (tmp_path / 'b').exists()
    capfd.readouterr()
    shared = train(
        tmp_path / 'c', three((10, 0, 0)), init=Init(tmp_path / 'a', ('model',)), seed=4, seeds=3
    )
    assert same(shared['model'], jax.tree.map(lambda x: np.stack([x[1]] * 3), there['model']))
    assert not np.array_equal(shared['head']['w'][0], shared['head']['w'][1])
    assert 'of seed 1, one model for all 3 seeds' in capfd.readouterr().err
    assert config_of(tmp_path / 'c')['from']['seeds'] == [1, 1, 1]


def wider(agent):
    init = type(agent).init

    class Wider(type(agent)):
        def init(self, key):
            params = init(self, key)
            return {**params, 'model': dict(w=np.zeros((3, 9), np.float32), v=params['model']['v'])}

    return Wider(agent.phases)


@pytest.mark.parametrize(
    'init, changes, words',
    [
        (
            dict(phases=('tail',)),
            {},
            ["phase 'tail' is unknown, this agent has model, head, other"],
        ),
        (
            {},
            {},
            [
                'every phase (model, head, other) is taken',
                'take fewer, e.g. ',
                ':head, or train one on',
                ':other+',
            ],
        ),
        (
            dict(phases=('model', 'other')),
            dict(config=dict(config=dict(width=9))),
            ['width is 8 there, 9 here'],
        ),
        (
            dict(phases=('model',)),
            dict(agent=wider(three())),
            ["model/w is [3, 8, 'float32'] there, [3, 9, 'float32'] here"],
        ),
        (
            dict(phases=('model',), extend=True),
            {},
            ['model has had 10 updates, expected more than 10 here'],
        ),
        (dict(phases=('other',), extend=True), {}, ['other has had 5 updates']),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_and_nothing_is_made(
    source, tmp_path, init, changes, words
):
    with pytest.raises(UserError) as error:
        train(tmp_path / 'a', init=Init(source[0], **init), **changes)
    text = str(error.value)
    assert all(word in text for word in words) and '\n' not in text, text
    assert not (tmp_path / 'a').exists()


def test_a_phase_after_one_that_is_trained_here_is_not_taken_if_they_share_a_group(
    source, tmp_path
):
    agent = three()
    first, second, third = agent.phases
    agent = dataclasses.replace(
        agent, phases=(first, dataclasses.replace(third, trains=('head', 'other')), second)
    )
    with pytest.raises(
        UserError, match='head cannot be taken, it comes after other, which is to be trained'
    ):
        train(tmp_path / 'a', agent, init=Init(source[0], ('model', 'head')))


def test_weights_that_were_trained_on_are_refused_where_the_phase_end_was_not_kept(tmp_path):
    agent = three()
    both = dataclasses.replace(agent.phases[1], name='both', trains=('model', 'head'))
    agent = dataclasses.replace(agent, phases=(agent.phases[0], both, agent.phases[2]))
    train(tmp_path / 'a', agent, keep_phase_ends=False, max_to_keep=1)
    with pytest.raises(
        UserError, match='no checkpoint holds model as after phase model; they were trained on'
    ):
        train(tmp_path / 'b', agent, init=Init(tmp_path / 'a', ('model',)))
    longer = dataclasses.replace(both, steps=both.steps + 4)
    with pytest.raises(UserError, match='both cannot go on, the optimiser at its end was not kept'):
        train(tmp_path / 'b', dataclasses.replace(agent, phases=(agent.phases[0], longer, agent.phases[2])),
              init=Init(tmp_path / 'a', ('both',), extend=True))  # fmt: skip
    params = train(
        tmp_path / 'b', three((0, 0, 0)), init=Init(tmp_path / 'a', groups=('model', 'head'))
    )
    assert same(params['model'], checkpoint.load(tmp_path / 'a')[0]['model'])


def test_a_run_left_in_the_middle_gives_the_phases_it_finished(source, tmp_path):
    failing = FailingTable()
    failing.calls = 4
    with pytest.raises(Crash):
        train(tmp_path / 'a', source=failing, checkpoint_every_s=0.0)
    params = train(tmp_path / 'b', init=Init(tmp_path / 'a'))
    assert same(params, source[1])
    with pytest.raises(UserError, match='has not finished the phase head; finished: model'):
        train(tmp_path / 'c', init=Init(tmp_path / 'a', ('head',)))


def test_a_damaged_checkpoint_of_the_other_run_is_refused_and_left_alone(source, tmp_path):
    folder = tmp_path / 'source'
    shutil.copytree(source[0], folder)
    step = folder / 'checkpoints' / '000000010'
    weights = max(
        (p for p in (step / 'params').rglob('*') if p.is_file()), key=lambda p: p.stat().st_size
    )
    weights.write_bytes(weights.read_bytes()[:-1] + b'!')
    before = sorted(folder.rglob('*'))
    with pytest.raises(UserError, match=r'checkpoint .*000000010 is damaged \(checksum of params'):
        train(tmp_path / 'a', init=Init(folder, ('model',), groups=('head',)))
    (step / 'meta.json').write_text('{')
    with pytest.raises(UserError, match='is damaged or of another version'):
        train(tmp_path / 'a', init=Init(folder, ('model',)))
    with pytest.raises(UserError, match='not a run folder'):
        train(tmp_path / 'a', init=Init(tmp_path / 'nowhere'))
    assert sorted(folder.rglob('*')) == before and not (tmp_path / 'a').exists()


def test_what_keeps_a_phase_trained_on_from_equalling_one_at_once_is_named(source, tmp_path, capfd):
    agent = three((20, 0, 0))
    agent = dataclasses.replace(
        agent, phases=(dataclasses.replace(agent.phases[0], scheduled=True), *agent.phases[1:])
    )
    init = Init(source[0], ('model',), extend=True)
    train(tmp_path / 'a', agent, init=init)
    said = capfd.readouterr().err
    assert 'not what 20 at once give: its learning rate, which follows their number' in said
    config = {**CONFIG, 'dataset': 'e', 'config': {**CONFIG['config'], 'beta': 3}}
    train(tmp_path / 'b', three((20, 0, 0)), init=init, config=config)
    said = capfd.readouterr().err
    assert (
        "at once give: what differs; differs: dataset 'd' there, 'e' here, beta '(absent)' there, 3 here"
        in said
    )
    assert config_of(tmp_path / 'b')['from']['differs']['dataset'] == ['d', 'e']
