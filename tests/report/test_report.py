"""The report of a made-up run: its numbers are on the page, nothing is fetched, nothing hostile
gets through.
"""

import html.parser
import itertools
import json
import re

import numpy as np
import pytest

from reverie import report
from reverie.evaluation import results
from reverie.report.attention import attended_steps, heat
from reverie.report.charts import Line, curves, ticks
from reverie.text import number
from reverie.types import UserError

HOSTILE = '<script src="https://evil.example/x.js">alert("1")</script>'


class Tags(html.parser.HTMLParser):
    """Every tag with its attributes; open tags must be closed in order."""

    VOID = frozenset({'meta', 'img', 'br', 'link', 'input', 'rect', 'circle', 'line', 'polyline'})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def samples(n=2, t=6, channels=4):
    rng = np.random.default_rng(0)
    grid = (rng.random((n, t, 5, 5, channels)) < 0.2).astype(np.float32)
    rows = {
        k: rng.random((n, t))
        for k in ('reward_true', 'reward_pred', 'value_pred', 'return_true', 'cont_pred')
    }
    mask = rng.random((2, n, 5, 5)) < np.array([0.0, 0.9])[:, None, None, None]
    return {
        'recon/truth': grid[:, 0],
        'recon/mask_rates': np.array([0.0, 0.9]),
        'recon/mask': mask,
        'recon/output': np.stack([grid[:, 0], 0.5 * grid[:, 0]]),
        'dream/truth': grid,
        'dream/dream': 0.9 * grid,
        'dream/context': np.array(2),
        'dream/action': rng.integers(0, 3, (n, t)),
        'dream/is_first': np.eye(n, t, 3, dtype=bool),
        **{f'dream/{k}': v for k, v in rows.items()},
    }


def write_run(folder, env='minatar/breakout', parts=('metrics', 'scores', 'samples'), channels=4):
    folder.mkdir(exist_ok=True)
    config = {
        'preset': 'dreamer4',
        'env': env,
        'command': f'reverie train dreamer4 --env {env}',
        'seeds': [0, 1],
    }
    config |= {
        'config': {'width': 128, 'name': env},
        'channels': ['paddle', env],
        'actions': ['noop', 'left', env],
    }
    (folder / 'config.json').write_text(json.dumps(config))
    if 'metrics' in parts:
        lines = [
            {
                'phase': phase,
                'step': i,
                'gradient_steps': i,
                'env_frames': 0,
                'seconds': 1.0 * i,
                f'loss/{env}': [2.0 / (i + 1), 3.0 / (i + 1)],
                'opt/grad_norm': 1.0,
                'loss/nan': float('nan'),
            }
            for phase in ('tokenizer', 'dynamics')
            for i in range(5)
        ]
        text = '\n'.join(map(json.dumps, lines))
        (folder / 'metrics.jsonl').write_text(text + '\n{"phase": "dyna')  # killed while writing
    if 'scores' in parts:
        outs = {'random': [0.0, 1.0], 'data': [2.0, 4.0], 'ppo': [9.0, 11.0]}
        outs['imagination'] = {
            'sampled': [[7.0, 8.5], [6.0, 7.5]],
            'greedy': [[8.0, 8.0], [9.0, 9.3]],
        }
        record = results.record(
            preset='dreamer4',
            env=env,
            command=config['command'],
            seeds=[0, 1],
            env_frames=12345,
            gradient_steps={'tokenizer': 5},
            seconds=61.0,
            scores=outs,
        )
        results.save(folder / 'scores.json', record)
    if 'samples' in parts:
        np.savez(folder / 'samples.npz', **samples(channels=channels))
    return folder


def test_the_page_holds_every_score_and_its_interval(tmp_path):
    page = report.write(write_run(tmp_path)).read_text()
    for text in (
        '7.25',
        '0.90 – 13.60',
        '8.57',
        '3.00',
        '10.00',
        '0.71',
        'Imagination RL',
        'greedy',
        '90% hidden',
    ):
        assert text in page, text
    assert '2.4 times the mean of the data' in page and '2 seeds' in page
    assert (
        page.count('>t over 2 seeds<') == 2 and '>t over 2 episodes of one seed<' in page
    )  # ours; PPO's
    assert 'Paired differences' not in page


def test_every_task_has_its_scores_and_a_damaged_file_of_one_is_said(tmp_path):
    folder = write_run(tmp_path)
    first = json.loads((folder / 'scores.json').read_text())
    assert 'Told the task' not in report.write(folder).read_text()
    (folder / 'scores.json').write_text(json.dumps(first | {'task': 'left'}))
    other = first | {'task': HOSTILE, 'env': 'minatar/asterix'}
    (folder / 'scores-right.json').write_text(json.dumps(other))
    (folder / 'scores-torn.json').write_text('{"score": ')
    page = report.write(folder).read_text()
    Tags(page)
    assert 'Told the task left, in minatar/breakout' in page and HOSTILE not in page
    assert 'Told the task &lt;script' in page and 'in minatar/asterix' in page
    assert page.count('class="bars"') == 2
    assert 'scores-torn.json of this run is damaged' in page


def test_the_page_heals_old_intervals_and_compares_read_outs_seed_by_seed(tmp_path):
    path = write_run(tmp_path) / 'scores.json'
    old = json.loads(path.read_text())
    old['score']['bc'] = {
        'per_seed': [[1.0, 2.0], [2.0, 2.0]],
        'mean': 9.0,
        'ci95': [1.0, 2.0],
        'ci95_over': 'seeds',
    }
    path.write_text(json.dumps(old))
    page = report.write(tmp_path).read_text()
    # imagination 7.75 and 6.75 less bc 1.5 and 2: 6.25 and 4.75, mean 5.5 with 12.71 * 0.75 on
    # either side
    assert (
        'Imagination RL minus BC from scratch' in page
        and '6.25, 4.75' in page
        and '−4.03 – 15.03' in page
    )
    assert '>1.75<' in page and '9.00<' not in page
    Tags(page)
    path.write_text('{"score": {"bc": {"mean": 1.0}}}')
    assert 'scores.json of this run is damaged' in report.write(tmp_path).read_text()


def test_one_episode_of_one_seed_has_a_score_and_no_interval(tmp_path):
    scores = results.record(
        preset='a',
        env='e',
        command='c',
        seeds=[0],
        env_frames=1,
        gradient_steps={},
        seconds=1.0,
        scores={'agent': [4.0]},
    )
    results.save(write_run(tmp_path) / 'scores.json', scores)
    page = report.write(tmp_path).read_text()
    assert '(no interval; 1 episodes)' in page and '>none, n = 1<' in page


def test_the_page_asks_nothing_of_the_network_and_escapes_hostile_names(tmp_path):
    page = report.write(write_run(tmp_path, env=HOSTILE)).read_text()
    tags = Tags(page).tags
    assert not {'script', 'link', 'iframe', 'object', 'base', 'form'} & {tag for tag, _ in tags}
    sources = [a[k] for _, a in tags for k in ('src', 'href', 'srcset', 'data', 'poster') if k in a]
    assert len(sources) > 10 and all(s.startswith('data:image/png;base64,') for s in sources)
    assert not [k for _, a in tags for k in a if k.startswith('on')]
    assert not re.search(r'url\(|@import', page)
    assert "default-src 'none'" in page and '&lt;script' in page


def test_the_runs_it_was_taken_from_are_listed_back_to_the_first(tmp_path):
    folder = write_run(tmp_path)
    assert 'Where it comes from' not in report.write(folder).read_text()
    entry = {
        'seeds': [0, 1],
        'extended': {},
        'seconds': 60.0,
        'of': {'preset': 'dreamer4', 'commit': 'abc123'},
    }
    first = {
        **entry,
        'run': '/runs/first',
        'phases': {'tokenizer': {}},
        'groups': {'encoder': '1', 'decoder': '1'},
    }
    first |= {'from': None, 'of': {'dataset': HOSTILE}}
    second = {
        **entry,
        'run': '/runs/second',
        'phases': {},
        'groups': {'policy': '2'},
        'extended': {'imagine': {}},
    }
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, 'from': {**second, 'from': first}}))
    page = report.write(folder).read_text()
    rows = re.search('Where it comes from.*?</section>', page, re.DOTALL)[0].split('<tr>')[2:]
    assert 'second' in rows[0] and 'imagine, trained on (policy)' in rows[0] and 'abc123' in rows[0]
    assert 'first' in rows[1] and 'tokenizer (encoder, decoder)' in rows[1] and '60 s' in rows[1]
    assert 'script' not in {tag for tag, _ in Tags(page).tags}


@pytest.mark.parametrize('part', ['metrics', 'scores', 'samples'])
def test_a_missing_part_is_said_in_its_place(tmp_path, part):
    parts = {'metrics', 'scores', 'samples'} - {part}
    page = report.write(write_run(tmp_path, parts=tuple(parts))).read_text()
    name = {'metrics': 'metrics.jsonl', 'scores': 'scores.json', 'samples': 'samples.npz'}[part]
    assert f'This run has no {name} yet.' in page
    Tags(page)


def test_a_damaged_file_is_said_in_its_place(tmp_path):
    write_run(tmp_path)
    (tmp_path / 'samples.npz').write_bytes((tmp_path / 'samples.npz').read_bytes()[:100])
    (tmp_path / 'scores.json').write_text('{"score":')
    page = report.write(tmp_path).read_text()
    assert (
        'samples.npz of this run is damaged' in page
        and 'scores.json of this run is damaged' in page
    )
    assert '1 line of metrics.jsonl could not be read' in page


def test_a_folder_that_is_no_run_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r'not a run folder, expected a config\.json'):
        report.write(tmp_path)
    (tmp_path / 'config.json').write_text('[')
    with pytest.raises(UserError, match=r'config\.json cannot be read'):
        report.write(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ['config.json']


def test_colour_images_are_shown_as_they_are(tmp_path):
    page = report.write(write_run(tmp_path, channels=3)).read_text()
    assert 'class="cell"' not in page and 'Real and dreamed' in page


def test_dreams_of_numbers_are_curves_and_an_agent_that_plays_has_no_tokenizer(tmp_path):
    config = json.loads((write_run(tmp_path) / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(
        json.dumps({**config, 'env_options': {}, 'channels': ['place']})
    )
    numbers = {
        f'dream/{k}': np.linspace(0, 1, 2 * 6 * 3).reshape(2, 6, 3) for k in ('truth', 'dream')
    }
    np.savez(tmp_path / 'samples.npz', **samples() | numbers)
    page = report.write(tmp_path).read_text()
    assert all(
        f'dream {i}: {name}' in page
        for i in (1, 2)
        for name in ('place', 'observation 2', 'observation 3')
    )
    assert 'data:image/png' not in page and 'Tokenizer' not in page and 'dream 1: value' in page
    Tags(page)


def test_a_curve_ends_where_its_data_ends():
    svg = curves([Line(np.arange(1000.0), np.linspace(5, 9, 1000))], 'update', 'loss', log=False)
    points = [
        tuple(map(float, p.split(','))) for p in re.search(r'points="([^"]*)"', svg)[1].split()
    ]
    assert len(points) <= 240 and points[0][0] < 50 and points[-1][0] > 320
    assert all(a[1] > b[1] for a, b in itertools.pairwise(points))  # rising values, falling pixels


def test_numbers_are_short_and_ticks_are_round():
    assert [number(x) for x in (0.5, 12.34, 1e6, 12345, -3.2, float('nan'))] == \
        ['0.500', '12.3', '1.00M', '12.3k', '−3.20', '–']  # fmt: skip
    assert ticks(0.0, 13.2) == [0, 5, 10] and ticks(-1.0, 1.0) == [-1, -0.5, 0, 0.5, 1]


def test_attention_is_shown_per_head_on_average_and_by_the_frames_looked_at(tmp_path):
    weights = np.tril(np.ones((6, 6))) / np.arange(1, 7)[:, None]
    weights[5] = (0.7, 0.3, 0, 0, 0, 0)
    attention_maps = np.stack([np.stack([weights, np.eye(6)])] * 3).astype(
        np.float16
    )  # 3 layers, 2 heads
    assert 'What it looks at' not in report.write(write_run(tmp_path)).read_text()
    np.savez(tmp_path / 'samples.npz', **samples(), **{'attention/weights': attention_maps})
    page = report.write(tmp_path).read_text()
    tags = Tags(page).tags
    assert (
        len([a for tag, a in tags if tag == 'img' and a['alt'].startswith('attention, ')])
        == 1 + 3 * 2
    )
    assert (
        'Step 6 looks at' in page
        and '5 back<br>35%' in page
        and '4 back<br>15%' in page
        and 'itself<br>50%' in page
    )
    assert attended_steps(weights)[5] == 1 and attended_steps(np.eye(6)).max() == 0
    picture = heat(weights, 60)
    assert (
        picture.shape == (60, 60, 3)
        and len(np.unique(picture[np.triu_indices(60, 10)], axis=0)) == 1
    )
    brightness = picture.sum(-1, dtype=int)
    assert brightness[55, 5] < brightness[55, 15] < brightness[55, 25]  # more is darker


def changed(value, rng):
    """A JSON value with one entry, somewhere within, replaced by something else."""
    others = [None, 'text', -1, [], {}, [[]], True, 1e400]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = list(value)[rng.integers(len(value))]
        return {**value, key: changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.integers(len(value))
        return [*value[:at], changed(value[at], rng), *value[at + 1 :]]
    return others[rng.integers(len(others))]


@pytest.mark.parametrize('name', ['scores.json', 'config.json', 'samples.npz'])
def test_files_of_other_contents_make_a_page_all_the_same(tmp_path, name):
    """A part that cannot be shown says so in its place; never a traceback."""
    rng = np.random.default_rng(0)
    folder = write_run(tmp_path / 'run')
    before = (folder / name).read_bytes()
    for _ in range(40):
        if name == 'samples.npz':
            arrays = samples(channels=4)
            key = list(arrays)[rng.integers(len(arrays))]
            others = [
                np.zeros(0),
                np.array('text'),
                np.zeros((2, 3)),
                np.full(arrays[key].shape, np.nan),
            ]
            np.savez(folder / name, **{**arrays, key: others[rng.integers(len(others))]})
        else:
            (folder / name).write_text(json.dumps(changed(json.loads(before), rng)))
        try:
            Tags(report.write(folder).read_text())
        except UserError as error:
            assert name == 'config.json' and '\n' not in str(error)


def test_a_part_that_cannot_be_shown_says_why_and_the_others_are_there(tmp_path, capfd):
    folder = write_run(tmp_path)
    arrays = samples(channels=4)
    np.savez(folder / 'samples.npz', **{**arrays, 'dream/dream': np.zeros(3)})
    page = report.write(folder).read_text()
    assert 'The part dreams cannot be shown' in page and 'Imagination RL' in page
    assert 'without its part dreams' in capfd.readouterr().err
