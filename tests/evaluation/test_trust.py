"""Trust numbers of world models whose dreams are known: right ones, and ones with a known fault."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reverie import report
from reverie.agents import registry
from reverie.commands.collect import dataset
from reverie.commands.experiment import Recorded
from reverie.data import Writer
from reverie.data.episodes import Episodes
from reverie.data.source import Dataset
from reverie.data.sources import Resident, Streaming
from reverie.evaluation import trust
from reverie.report.html import escape
from reverie.types import ActionSpace, Batch, EnvSpec, Prediction, Step
from tests.report.test_report import Tags, write_run

SIDE, ACTIONS = 5, 3
SPEC = EnvSpec(
    'test/ring',
    (1, SIDE, 2),
    ActionSpace('discrete', ACTIONS, tuple('abc')),
    channels=('player', 'ball'),
)
CONTEXT, END = 3, trust.HORIZON


def rules(player, ball, action):
    """Player and ball on a ring of five cells: the player moves by the action, the ball by one."""
    return (player + action) % SIDE, (ball + 1) % SIDE


def reward_of(player, ball):
    return (player == ball) * 1.0


def end_of(player, ball):
    return (player == 0) & (ball == SIDE - 1)


def play(seed: int, count: int) -> list[Step]:
    """Episodes that end by the rules, or are cut after 40 steps."""
    rng, episodes = np.random.default_rng(seed), []
    for _ in range(count):
        player, ball, moves = *rng.integers(0, SIDE, 2), rng.integers(0, ACTIONS, 40)
        places, taken = [(player, ball)], [0]
        while not end_of(*places[-1]) and len(places) < 40:
            taken.append(moves[len(places)])
            places.append(rules(*places[-1], taken[-1]))
        player, ball = np.array(places).T
        obs = np.stack([np.eye(SIDE, dtype=bool)[x] for x in (player, ball)], -1)[:, None]
        t = np.arange(len(obs))
        reward = np.where(t > 0, reward_of(player, ball), 0.0).astype(np.float32)
        action = np.eye(ACTIONS, dtype=np.float32)[taken] * (t > 0)[:, None]
        last = t == t[-1]
        episodes.append(Step(obs, action, reward, t == 0, last, last & end_of(player, ball)))
    return episodes


class Ring:
    """The ring's own rules as a world model; its state is the frame. Faults: see the parameters.

    lost: a channel that decoding leaves out. said: factor of the reward head. stuck: dreamed
    players do not move.
    """

    def __init__(self, lost=None, said=1.0, stuck=False):
        self.lost, self.said, self.stuck = lost, said, stuck

    def initial(self, batch):
        return jnp.zeros((batch, 1, SIDE, 2))

    def observe(self, state, step, key):
        state = step.obs.astype(jnp.float32)
        return state, jnp.concatenate([state.reshape(len(state), -1), step.is_first[:, None]], 1)

    def imagine(self, state, action, key):
        player, ball = (state[:, 0, :, i].argmax(-1) for i in (0, 1))
        player, ball = rules(player, ball, 0 if self.stuck else action.argmax(-1))
        state = jnp.stack([jax.nn.one_hot(x, SIDE) for x in (player, ball)], -1)[:, None]
        return state, self.predict(
            jnp.concatenate([state.reshape(len(state), -1), jnp.zeros((len(state), 1))], 1)
        )

    def predict(self, feat):
        cells = feat[:, :-1].reshape(-1, SIDE, 2)
        player, ball = (cells[..., i].argmax(-1) for i in (0, 1))
        reward = self.said * reward_of(player, ball) * (feat[:, -1] == 0)
        return Prediction(feat, reward, 1.0 - end_of(player, ball))

    def decode(self, state):
        return state if self.lost is None else state.at[..., self.lost].set(0.2)


@pytest.fixture(scope='module')
def episodes(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'ring'
    with Writer(path, SPEC) as writer:
        for step in play(0, 150):
            writer.add('random', step)
    return Episodes(path)


def measure(source, *models, windows=64, rows=32, **options):
    """One seed for each model."""
    table = jnp.arange(len(models))
    by_number = lambda params: Choice(models, params['number'])
    return trust.measure(
        by_number,
        {'number': table},
        source,
        jax.random.key(0),
        context=CONTEXT,
        channels=SPEC.channels,
        windows=windows,
        rows=rows,
        **options,
    )


class Choice(Ring):
    """The model with this number, known only when the program runs: what the weights of a seed are
    otherwise.
    """

    def __init__(self, models, number):
        self.models, self.number = models, number

    def _of(self, name, *args):
        found = [getattr(model, name)(*args) for model in self.models]
        return jax.tree.map(lambda *xs: jnp.stack(xs)[self.number], *found)

    def imagine(self, *args):
        return self._of('imagine', *args)

    def predict(self, feat):
        return self._of('predict', feat)

    def decode(self, state):
        return self._of('decode', state)


@pytest.mark.parametrize(
    'kind',
    [Resident, lambda e: Streaming(e, group_bytes=500 * e.bytes_per_frame)],
    ids=['resident', 'streaming'],
)
def test_a_perfect_model_keeps_every_cell_and_says_every_event(episodes, kind):
    found = measure(kind(episodes), Ring())
    assert (found['windows'], found['context'], found['steps']) == (
        64,
        CONTEXT,
        [[1, 1], [2, 4], [5, 8], [9, 16]],
    )
    assert [c['name'] for c in found['channels']] == ['player', 'ball']
    perfect = {'mean': 1.0, 'per_seed': [1.0]}
    for channel in found['channels']:
        assert all(
            x == {'recall': perfect, 'precision': perfect}
            for x in (channel['tokenizer'], *channel['dream'])
        )
    for name in trust.HEADS:
        for head in (found[name]['recorded'], *found[name]['dream']):
            assert head['said'] == head['true'] and head['ap'] in (
                perfect,
                {'mean': None, 'per_seed': [None]},
            )
        assert (
            found[name]['recorded']['ap'] == perfect
            and 0 < found[name]['recorded']['true']['mean'] < 1
        )
    assert trust.warnings(found) == []
    assert trust.lines(found) == [
        'trust least recall of a channel: 100% by the tokenizer (ball), 100% at dreamed step 1 (ball), '
        '100% at dreamed steps 9 to 16 (ball); '
        'said / true on recorded frames: reward 1.00, end 1.00'
    ]


def test_a_channel_that_is_dropped_and_a_head_that_says_double_are_named(episodes):
    found = measure(Resident(episodes), Ring(lost=1, said=2.0))
    player, ball = found['channels']
    assert player['tokenizer']['recall']['mean'] == player['dream'][3]['precision']['mean'] == 1
    for cells in (ball['tokenizer'], *ball['dream']):
        assert cells == {
            'recall': {'mean': 0, 'per_seed': [0]},
            'precision': {'mean': None, 'per_seed': [None]},
        }
    recorded = found['reward']['recorded']
    assert (
        recorded['said']['mean'] == pytest.approx(2 * recorded['true']['mean'])
        and recorded['ap']['mean'] == 1
    )
    head, channel = trust.warnings(found)
    assert head.startswith('reward head says ') and 'end head' not in head
    assert channel == 'recall of ball: 0% by the tokenizer, 0% at the first dreamed step'
    assert [line.startswith('trust WARNING') for line in trust.lines(found)] == [False, True, True]
    assert (
        '0% by the tokenizer (ball)' in trust.lines(found)[0]
        and 'reward 2.00, end 1.00' in trust.lines(found)[0]
    )


def test_a_channel_lost_in_dreams_alone_is_the_dream_s_fault(episodes):
    found = measure(Resident(episodes), Ring(stuck=True), windows=256)
    player, ball = found['channels']
    assert player['tokenizer']['recall']['mean'] == ball['dream'][3]['recall']['mean'] == 1
    assert 0.2 < player['dream'][0]['recall']['mean'] < 0.5  # one action of three does not move
    assert ['player' in text for text in trust.warnings(found)] == [True]
    assert (
        found['reward']['recorded']['ap']['mean'] == 1 > found['reward']['dream'][3]['ap']['mean']
    )


def test_every_seed_is_measured_on_the_same_windows_and_the_worst_is_named(episodes):
    source = Resident(episodes)
    found = measure(source, Ring(), Ring(lost=0), Ring(lost=0, said=2.0))
    player = found['channels'][0]['tokenizer']
    assert player['recall'] == {'mean': pytest.approx(1 / 3), 'per_seed': [1, 0, 0]}
    assert player['precision'] == {
        'mean': 1,
        'per_seed': [1, None, None],
    }  # the mean of the seed that has one
    true = found['reward']['recorded']['true']['per_seed']
    assert (
        true[0]
        == true[1]
        == true[2]
        == measure(source, Ring())['reward']['recorded']['true']['mean']
    )
    assert [text.split('(')[1] for text in trust.warnings(found)] == \
        ['worst of 1 such seeds of 3)', 'worst of 2 such seeds of 3)']  # fmt: skip
    json.dumps(found, allow_nan=False)


class Listed(Dataset):
    """A source that hands out given windows one chunk after the other."""

    def __init__(self, batch: Batch):
        self.batch, self.at, self.data = batch, 0, {}

    def load(self, updates, batch, length, seeds, relevant=0.0):
        self.at += batch
        return jax.tree.map(
            lambda x: jnp.asarray(x[self.at - batch : self.at])[None, None], self.batch
        )

    def draw(self, data, loaded, key, batch, length, relevant=0.0):
        return loaded

    def get_state(self):
        return {}

    def set_state(self, state):
        """Nothing to restore."""


def listed(count: int) -> Batch:
    """Windows of play laid end to end; actions of every fifth are unknown, rewards of every third."""
    stream = jax.tree.map(lambda *xs: np.concatenate(xs), *play(1, 80))
    starts = np.random.default_rng(2).integers(0, len(stream.reward) - CONTEXT - END, count)
    step = jax.tree.map(lambda x: np.stack([x[i : i + CONTEXT + END] for i in starts]), stream)
    rows = np.arange(count)
    return Batch(step, rows % 5 > 0, rows % 3 > 0, np.zeros(count, bool))


def test_the_numbers_equal_a_loop_over_windows_steps_and_cells():
    """A model whose dreamed players stand still, against the rules played again in Python."""
    batch = listed(48)
    found = measure(Listed(batch), Ring(stuck=True), windows=48, rows=16)
    spans = [range(first - 1, last) for first, last in trust.STEPS]
    true, made, right = (np.zeros((len(spans), 2), int) for _ in range(3))
    rewards: list[list[tuple[float, float]]] = [[] for _ in spans]
    frames = np.zeros(len(spans), int)
    for i in range(48):
        if not batch.has_action[i]:
            continue
        at = [int(batch.step.obs[i, CONTEXT - 1, 0, :, c].argmax()) for c in (0, 1)]
        for h in range(END):
            if batch.step.is_first[i, CONTEXT + h]:
                break
            at = [at[0], (at[1] + 1) % SIDE]
            span = next(s for s, steps in enumerate(spans) if h in steps)
            frames[span] += 1
            for channel in (0, 1):
                for cell in range(SIDE):
                    is_true = bool(batch.step.obs[i, CONTEXT + h, 0, cell, channel])
                    true[span, channel] += is_true
                    made[span, channel] += at[channel] == cell
                    right[span, channel] += is_true and at[channel] == cell
            if batch.has_reward[i]:
                rewards[span].append((reward_of(*at), float(batch.step.reward[i, CONTEXT + h])))
    assert found['frames'] == frames.tolist() and frames[0] <= 48 - 10
    for channel in (0, 1):
        for span, cells in enumerate(found['channels'][channel]['dream']):
            assert cells['recall']['mean'] == pytest.approx(
                right[span, channel] / true[span, channel]
            )
            assert cells['precision']['mean'] == pytest.approx(
                right[span, channel] / made[span, channel]
            )
    for span, head in enumerate(found['reward']['dream']):
        said, happened = np.array(rewards[span]).T
        assert head['said']['mean'] == pytest.approx(said.mean())
        assert head['true']['mean'] == pytest.approx(happened.mean())
        assert head['ap']['mean'] == pytest.approx(loop_ap(said, happened > 0))


def loop_ap(score, event):
    """Average precision by its definition: over thresholds from high to low, (R_n - R_n-1) P_n."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(score), reverse=True):
        chosen = [bool(e) for s, e in zip(score, event, strict=True) if s >= threshold]
        recall = sum(chosen) / sum(map(bool, event))
        total, before = total + (recall - before) * sum(chosen) / len(chosen), recall
    return total


@pytest.mark.parametrize('levels', [1, 2, 7, 10_000])
def test_average_precision_equals_a_loop_over_thresholds_ties_included(levels):
    rng = np.random.default_rng(levels)
    for share in (0.02, 0.5, 1.0):
        score, event = rng.integers(0, levels, 300) / levels, rng.random(300) < share
        event[0] = True
        assert trust.average_precision(score, event) == pytest.approx(
            loop_ap(score, event), rel=1e-12
        )


def test_average_precision_of_the_published_example():
    score, event = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
    assert trust.average_precision(score, event) == pytest.approx(
        0.8333, abs=1e-4
    )  # scikit-learn's documentation
    assert trust.average_precision(np.zeros(10), np.arange(10) < 3) == pytest.approx(
        0.3
    )  # one threshold: the rate
    assert trust.average_precision(np.zeros(10), np.zeros(10, bool)) is None


def test_nothing_to_be_found_is_null_and_no_warning():
    """A channel without a true cell, no reward, no end, no known action."""
    batch = listed(16)
    obs = batch.step.obs & np.array([True, False])
    quiet = batch.step._replace(
        obs=obs, reward=0 * batch.step.reward, is_terminal=batch.step.is_terminal & False,
    )  # fmt: skip
    found = measure(Listed(batch._replace(step=quiet)), Ring(), windows=16, rows=16)
    nothing = {'mean': None, 'per_seed': [None]}
    ball = found['channels'][1]
    assert all(
        x == {'recall': nothing, 'precision': nothing} for x in (ball['tokenizer'], *ball['dream'])
    )
    assert (
        found['reward']['recorded']['ap'] == nothing
        and found['reward']['recorded']['said']['mean'] > 0
    )
    unknown = measure(
        Listed(batch._replace(has_action=np.zeros(16, bool))), Ring(), windows=16, rows=16
    )
    assert unknown['frames'] == [0, 0, 0, 0] and unknown['reward']['recorded']['said'] == nothing
    for numbers in (found, unknown):
        assert trust.warnings(numbers) == [] and len(trust.lines(numbers)) == 1
        json.dumps(numbers, allow_nan=False)


def test_a_head_is_off_beyond_a_third_on_either_side():
    assert [trust.off(said, 0.12) for said in (0.08, 0.0901, 0.1599, 0.17, 0.0)] == [
        True,
        False,
        False,
        True,
        True,
    ]
    assert not trust.off(None, 0.1) and not trust.off(0.1, 0.0) and not trust.off(0.1, None)


def imagination(kl, ret, prior=None, seeds=False):
    """Metrics of a phase, a record every 50 updates."""
    rows = {}
    for i in range(len(kl)):
        names = {'imag/kl': kl[i], 'imag/return': ret[i]} | (
            {'imag/return_prior': prior[i]} if prior else {}
        )
        row = {name: float(np.mean(x)) for name, x in names.items()}
        row |= {f'{name}/seeds': list(x) for name, x in names.items()} if seeds else {}
        step = 50 * (i + 1)
        at = {'phase': 'imagine', 'step': step, 'gradient_steps': step, 'env_frames': 0}
        rows[step] = at | {'seconds': 1.0 * step, 'loss/policy': 1.0, **row}
    return rows


def test_a_dreamed_return_that_rises_while_kl_passes_1_is_noticed():
    assert trust.exploited(imagination([0.1, 0.5, 1.1, 1.3], [1.0, 2.0, 3.0, 4.0])) == [150]
    assert trust.exploited(imagination([0.1, 0.5, 0.9, 1.0], [1.0, 2.0, 3.0, 4.0])) == [
        None
    ]  # near its prior
    assert trust.exploited(imagination([0.1, 0.5, 1.1, 1.3], [4.0, 3.0, 2.0, 1.0])) == [
        None
    ]  # falls
    assert trust.exploited(imagination([1.5, 1.6], [1.0, 2.0])) == [50]  # from the first record on
    # starts that pay more, for the prior as well, are no rise
    assert trust.exploited(
        imagination([0.1, 0.5, 1.1, 1.3], [1.0, 2.0, 3.0, 4.0], [0.5, 1.5, 2.5, 3.5])
    ) == [None]
    two = imagination(
        [(0.1, 0.1), (0.2, 1.2), (0.3, 1.4)], [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)], seeds=True
    )
    assert trust.exploited(two) == [None, 100]


def test_records_of_older_runs_are_tolerated():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert trust.exploited({}) == trust.exploited({4: {'loss/policy': 1.0}}) == []
        assert trust.exploited(imagination([2.0], [1.0])) == []
        older, newer = (
            imagination([0.1, 0.2], [1.0, 1.0]),
            imagination([0.5, 1.5], [1.0, 2.0], [1.0, 1.0]),
        )
        rows = older | {100 + step: row for step, row in newer.items()}
        assert trust.exploited(rows) == [200]  # those that lack the prior's are left out


def test_the_report_shows_the_numbers_the_warnings_and_when_imagination_may_exploit(
    tmp_path, episodes
):
    folder = write_run(tmp_path)
    old = report.write(folder).read_text()
    assert (
        'Can this dream be trusted?' in old
        and 'No trust numbers' in old
        and 'class="low"' not in old
    )
    scores = json.loads((folder / 'scores.json').read_text())
    found = measure(Resident(episodes), Ring(lost=1, said=2.0))
    found['channels'][1]['name'] = '<b>ball'
    (folder / 'scores.json').write_text(json.dumps(scores | {'trust': found}))
    with open(folder / 'metrics.jsonl', 'a') as file:
        rows = imagination([0.1, 1.2, 1.4], [1.0, 2.0, 3.0])
        file.write(''.join(f'\n{json.dumps(row)}' for row in rows.values()))
    page = report.write(folder).read_text()
    Tags(page)
    assert (
        'No trust numbers' not in page and '64 windows' in page and '<td>1.00 / 1.00</td>' in page
    )
    assert page.count('<td class="low">0.00 / –</td>') == 5 and '<b>ball' not in page
    assert (
        'Reward head says' in page
        and 'From update 100 of imagination on the policy is more than 1 nat' in page
    )
    frames = found['frames']
    assert all(f'<td>{n:,}</td>' in page for n in (*frames, sum(frames)))
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | {'env_options': {}}))
    assert 'be trusted' not in report.write(folder).read_text()  # an agent that plays


def test_a_world_model_alone_is_judged_by_its_cells(tmp_path, episodes):
    whole, cells = (
        measure(Resident(episodes), Ring(lost=1), **more) for more in ({}, {'heads': ()})
    )
    assert cells == {name: x for name, x in whole.items() if name not in trust.HEADS}
    said = trust.lines(cells)
    assert 'least recall of a channel' in said[0] and 'said / true' not in said[0]
    assert not any(' head says ' in line for line in said)
    folder = write_run(tmp_path)
    scores = json.loads((folder / 'scores.json').read_text())
    (folder / 'scores.json').write_text(json.dumps(scores | {'trust': cells}))
    page = report.write(folder).read_text()
    Tags(page)
    assert '64 windows' in page and 'Rewards and ends' not in page


def test_a_world_model_alone_of_a_game_is_measured_on_what_is_held_out(tmp_path):
    dataset.write_dataset(
        tmp_path / 'data', 'minatar/breakout', 'random', 2000, episodes=2, holdout=0.25
    )
    config = dataclasses.replace(registry.get('dreamer4_debug'), policy=False)
    experiment = Recorded('dreamer4_debug', config, 'minatar/breakout', data=(tmp_path / 'data',))
    params = jax.tree.map(lambda x: x[None], experiment.agent.init(jax.random.key(0)))
    phases = {phase.name: {'steps': phase.steps} for phase in experiment.agent.phases}
    (tmp_path / 'config.json').write_text(json.dumps(experiment.describe() | {'phases': phases}))
    (tmp_path / 'metrics.jsonl').write_text('')
    said: list[str] = []
    experiment.evaluate(tmp_path, params, 2, 20, say=said.append, paths=[tmp_path / 'scores.json'])
    assert 'eval  no scores: the agent is a world model alone' in said
    found = json.loads((tmp_path / 'scores.json').read_text())
    assert not set(trust.HEADS) & set(found['trust'])
    (dreams,) = found['recordings']
    assert dreams['held_out'] and set(dreams['tokenizer']) == {'psnr', 'ssim'}
    assert set(dreams['differences']) == {'true - shuffled', 'true - none', 'true - held'}
    page = report.write(tmp_path).read_text()
    Tags(page)
    assert 'Dreams beside recordings' in page and 'held-out recordings' in page
    assert 'Likeness of dreamed frames to the recording: ' in page


@pytest.mark.whole
def test_scoring_a_dreamer4_run_measures_it_first_and_keeps_the_numbers_of_all_seeds(tmp_path):
    dataset.write_dataset(tmp_path / 'data', 'minatar/breakout', 'random', 600, episodes=2)
    config = registry.get('dreamer4_debug')
    experiment = Recorded(
        'dreamer4_debug', config, 'minatar/breakout', seeds=2, data=(tmp_path / 'data',)
    )
    agent = experiment.agent
    params = jax.tree.map(
        lambda *xs: jnp.stack(xs), *(agent.init(jax.random.key(i)) for i in (0, 1))
    )
    phases = {phase.name: {'steps': phase.steps} for phase in agent.phases}
    (tmp_path / 'config.json').write_text(json.dumps(experiment.describe() | {'phases': phases}))
    (tmp_path / 'metrics.jsonl').write_text('')
    said: list[str] = []
    experiment.evaluate(tmp_path, params, 2, 20, say=said.append, paths=[tmp_path / 'scores.json'])
    found = json.loads((tmp_path / 'scores.json').read_text())['trust']
    kinds = [line.split()[0] for line in said]
    assert (
        kinds == sorted(kinds, reverse=True)
        and kinds.count('trust') >= 1
        and kinds.count('eval') >= 6
    )
    assert (
        found['windows'] == 600 // trust.HORIZON
        and found['context'] == config.dynamics.transformer.context
    )
    assert [c['name'] for c in found['channels']] == list(experiment.spec.channels)
    assert (
        found['frames'][0] > 0.7 * found['windows']
        and 0 < found['end']['recorded']['true']['mean'] < 0.3
    )
    one, two = (recall := found['channels'][-1]['tokenizer']['recall'])['per_seed']
    assert (
        0 <= one <= 1
        and 0 <= two <= 1
        and one != two
        and recall['mean'] == pytest.approx((one + two) / 2)
    )
    page = report.write(tmp_path).read_text()
    assert (
        '37 windows' in page
        and 'means over 2 seeds' in page
        and escape(said[1].split('WARNING ')[1][1:]) in page
    )
