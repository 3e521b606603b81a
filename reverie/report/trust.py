"""The trust section of a report: cells that dreams keep, and calibration of the heads."""

from collections.abc import Mapping, Sequence
from typing import Any

from reverie.evaluation.ranking import SPANS, sentence
from reverie.evaluation.trust import (
    HORIZON,
    KL,
    exploited,
    faint,
    heads_of,
    of_ceiling,
    off,
    steps,
    warnings,
)
from reverie.report import charts
from reverie.report.html import cell, escape, figure, missing, row, table
from reverie.report.run import RunFiles
from reverie.text import number


def _share(x: float | None) -> str:
    return '–' if x is None else f'{x:.2f}'


def _channel_table(trust: Mapping[str, Any]) -> str:
    """Recall / precision of each channel: tokenizer, then the dreamed steps."""
    places = ['tokenizer', *(steps(trust, i) for i in range(len(trust['steps'])))]
    rows = []
    for channel in trust['channels']:
        cells = [cell(channel['name'])]
        for x in (channel['tokenizer'], *channel['dream']):
            recall, precision = x['recall']['mean'], x['precision']['mean']
            low = 'low' if faint(recall) else ''
            cells.append(cell(f'{_share(recall)} / {_share(precision)}', low))
        rows.append(row(cells))
    return table(['Channel', *places], rows)


def _ceiling_table(trust: Mapping[str, Any]) -> str:
    """Recall of dreams divided by that of the game itself, which stands in brackets."""
    spans = range(len(trust['steps']))
    rows = []
    for channel in trust['channels']:
        cells = [cell(channel['name'])]
        for i in spans:
            share = of_ceiling(channel, i)
            cells.append(
                cell(
                    f'{_share(share)} ({_share(channel["ceiling"][i]["recall"])})',
                    'low' * faint(share),
                )
            )
        rows.append(row(cells))
    return table(['Channel', *(steps(trust, i) for i in spans)], rows)


def _head_table(trust: Mapping[str, Any]) -> str:
    """Said, true and average precision of rewards and ends: on recorded frames, then in dreams."""
    judged = heads_of(trust)
    names = ''.join(f'<th colspan="3">{name}</th>' for name in judged)
    columns = '<th>said</th><th>true</th><th>AP</th>' * len(judged)
    heads = [row(['<th></th><th></th>', names]), row(['<th></th><th>frames</th>', columns])]
    places = [('recorded', sum(trust['frames']), [trust[name]['recorded'] for name in judged])]
    for i, frames in enumerate(trust['frames']):
        dreamed = [trust[name]['dream'][i] for name in judged]
        places.append((f'dreamed {steps(trust, i)}', frames, dreamed))
    rows = []
    for where, frames, found in places:
        cells = [cell(where), cell(f'{frames:,}')]
        for head in found:
            said, true, ap = (head[which]['mean'] for which in ('said', 'true', 'ap'))
            low = 'low' if off(said, true) else ''
            cells += [cell(number(said), low), cell(number(true)), cell(_share(ap))]
        rows.append(row(cells))
    return table(heads, rows)


def _exploits(run: RunFiles) -> list[str]:
    """A sentence for each seed whose imagination may exploit the model."""
    found = exploited(run.metrics.get('imagine', {}))
    out = []
    for i, at in enumerate(found):
        if at is None:
            continue
        seed = '' if len(found) == 1 else f' of seed {i + 1} of {len(found)}'
        out.append(
            f'From update {at:,} of imagination on the policy{seed} is more than {KL:g} nat (KL) '
            'away from its prior while the dreamed return rises: it may have learnt errors of the '
            'model, for which the real environment does not pay.'
        )
    return out


def _ranking(ranking: Mapping[str, Any]) -> list[str]:
    """Dreamed against real return of policies: the sentence, the points, the table."""
    policies = ranking['policies']
    text = sentence(ranking)
    note = (
        f'Means of {ranking["steps"]} steps, discounted by {number(ranking["discount"])} each, from the '
        f'same {ranking["starts"]} starts. PPO plays dreams by their decoded frames.'
    )
    places = [(p['name'], p['dreamed']['mean'], p['real']['mean']) for p in policies]
    plot = charts.scatter(places, 'dreamed return', 'real against dreamed return of policies')
    rows = []
    for policy in sorted(policies, key=lambda p: -p['real']['mean']):
        said = [number(policy[which]['mean']) for which in ('real', 'dreamed')]
        rows.append(row([cell(policy['name']), *map(cell, said)]))
    return [
        '<h3>Dreamed against real return</h3>',
        f'<p>{escape(text[0].upper() + text[1:])}.</p><p class="note">{escape(note)}</p>',
        f'<div class="charts">{figure("real return", "line: as dreamed", plot)}</div>',
        table(['Policy', 'real', 'dreamed'], rows),
        '<h3>Drift</h3><p class="note">Means over random play and PPO. Coloured: off by more than a '
        'third.</p>',
        _drift_table(ranking['drift']),
    ]


def _drift_table(drift: Sequence[Mapping[str, Any]]) -> str:
    """Rewards and survival of dreams beside the game, by time."""
    rows = []
    for (first, last), span in zip(SPANS, drift, strict=True):
        said = [
            span[f'{who}_{what}']['mean']
            for what in ('reward', 'on')
            for who in ('dreamed', 'real')
        ]
        low = ['low' * off(said[0], said[1]), '', 'low' * off(said[2], said[3]), '']
        cells = [cell(number(x), kind) for x, kind in zip(said, low, strict=True)]
        rows.append(row([cell(f'{first} to {last}'), *cells]))
    names = ['Steps', 'reward within, dreamed', 'real', 'goes on after, dreamed', 'real']
    return table(names, rows)


def section(run: RunFiles) -> str:
    """Recall of dreams and calibration of the heads; for agents that learn from a dataset."""
    if 'env_options' in run.config:
        return ''
    out = ['<section><h2>Can this dream be trusted?</h2>']
    out += [f'<p class="missing">{escape(text)}</p>' for text in _exploits(run)]
    trust = run.scores.get('trust')
    if not isinstance(trust, dict):
        what = 'trust numbers, which are taken on boolean grids'
        return ''.join([*out, missing(run, 'scores.json', what), '</section>'])
    seeds = len(trust['channels'][0]['tokenizer']['recall']['per_seed'])
    means = f'; means over {seeds} seeds' if seeds > 1 else ''
    out.append(
        f'<p>{trust["windows"]:,} windows of recorded play: {trust["context"]} frames are given, '
        f'{HORIZON} dreamed under the recorded actions and compared until the episode ends{means}. '
        'The environment has chance of its own, so even a perfect model does not keep every cell.</p>'
    )
    if said := warnings(trust):
        sentences = '<br>'.join(f'{escape(text[0].upper() + text[1:])}.' for text in said)
        out.append(f'<p class="missing">{sentences}</p>')
    note = 'Tokenizer: the same frames, encoded and decoded. Coloured: more than half are lost.'
    out += ['<h3>Cells: recall / precision</h3>', f'<p class="note">{note}</p>']
    out.append(_channel_table(trust))
    if 'ceiling' in trust['channels'][0]:
        note = (
            'In brackets: recall of the game itself, gone on from the same state under the same actions '
            'with other dice; sticky actions part the two.'
        )
        out += [f'<h3>Recall divided by that of the game</h3><p class="note">{note}</p>']
        out.append(_ceiling_table(trust))
    if 'ranking' in trust:
        out += _ranking(trust['ranking'])
    if not heads_of(trust):
        return ''.join([*out, '</section>'])
    out.append('<h3>Rewards and ends, a frame</h3>')
    note = (
        'Said and true: means of the head and of the data. AP: average precision of what is said '
    )
    note += 'for an event (a positive reward, an end). Coloured: off by more than a third.'
    out.append(f'<p class="note">{note}</p>')
    return ''.join([*out, _head_table(trust), '</section>'])
