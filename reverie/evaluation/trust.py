"""Trust in dreams: which cells of boolean grids a world model keeps, and how often its heads are
right.

Windows of recorded play are taken in twice: all frames observed, which shows the tokenizer and the
heads alone, and the first C frames observed and H dreamed under the recorded actions. Steps count
until the episode ends.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from reverie.data.sources import Dataset
from reverie.evaluation.openloop import dream
from reverie.report.page import Run, escape, missing
from reverie.text import number, percent
from reverie.types import Batch, Params, Prediction, WorldModel

WINDOWS, ROWS, HORIZON = 2048, 256, 16  # windows at most, in chunks of rows; dreamed steps
STEPS = ((1, 1), (2, 4), (5, 8), (9, 16))  # first and last of the dreamed steps that are pooled
RECALL = 0.5  # of a channel; below it the model is doubted
RATIO = 4 / 3  # of what a head says to what is true, or the inverse
KL = 1.0  # nats between the policy and its prior
HEADS = ('reward', 'end')


@runtime_checkable
class Judge(WorldModel, Protocol):
    """A world model whose heads can be asked about any frame, dreamed or observed."""

    def predict(self, feat: Float[Array, 'N F']) -> Prediction: ...


class EventCounts(NamedTuple):
    """H steps of N windows: cells are counted per step and channel, rewards and ends kept one by
    one.
    """

    valid: Any  # [N, H] bool: not beyond the episode's end, and the actions are known
    paid: Any  # [N, H] bool: of these, the steps whose rewards are known
    cells: (
        Any  # [5, H, c] int: true; reconstructed, and true among them; dreamed, and true among them
    )
    reward: Any  # [3, N, H]: true; said of the recorded frame; said of the dreamed frame
    end: Any  # [3, N, H], likewise


def examine(model: Judge, batch: Batch, context: int, key: PRNGKeyArray) -> EventCounts:
    """Traced: compare windows [N, context + H] of boolean grids with what the model makes of them."""
    time_major = jax.tree.map(lambda x: x.swapaxes(0, 1), batch.step)
    keys = jax.random.split(key, (2, len(time_major.reward)))

    def observe(carry, x):
        state, given = carry
        step, key, is_given = x
        state, feat = model.observe(state, step, key)
        given = jax.tree.map(lambda new, old: jnp.where(is_given, new, old), state, given)
        return (state, given), (model.decode(state), feat)

    # one scan over all frames that remembers the state the dream begins in: half the compilation of
    # two
    start = model.initial(len(batch.step.reward))
    seen = (time_major, keys[0], jnp.arange(len(keys[0])) < context)
    (_, given), (image, feat) = jax.lax.scan(observe, (start, start), seen)
    dreamed = dream(model, given, time_major.prev_action[context:], keys[1, context:])
    dreamed = jax.tree.map(lambda x: x.swapaxes(0, 1), dreamed)
    step = jax.tree.map(lambda x: x[:, context:], batch.step)
    image, feat = image[context:].swapaxes(0, 1), feat[context:].swapaxes(0, 1)
    n, h = step.is_first.shape
    said = model.predict(feat.reshape(n * h, -1))
    valid = (jnp.cumsum(step.is_first, 1) == 0) & batch.has_action[:, None]
    inside = valid[..., None, None, None]
    true, made, dreamt = (x & inside for x in (step.obs, image > 0.5, dreamed.image > 0.5))
    return EventCounts(
        valid,
        valid & batch.has_reward[:, None],
        jnp.stack([x.sum((0, 2, 3)) for x in (true, made, made & true, dreamt, dreamt & true)]),
        jnp.stack([step.reward, said.reward.reshape(n, h), dreamed.reward]),
        jnp.stack(
            [step.is_terminal.astype(jnp.float32), 1 - said.cont.reshape(n, h), 1 - dreamed.cont]
        ),
    )


def average_precision(
    score: Float[np.ndarray, ' n'], event: Bool[np.ndarray, ' n']
) -> float | None:
    """Sum over the distinct scores, from the highest, of the gain in recall times the precision;
    None without events.

    The definition of scikit-learn's `average_precision_score`: equal scores are one threshold.
    """
    if not event.any():
        return None
    order = np.argsort(-score, kind='stable')
    last = np.append(
        np.flatnonzero(np.diff(score[order])), len(score) - 1
    )  # of each run of equal scores
    hits = np.cumsum(event[order])[last]
    return float((np.diff(hits, prepend=0) * hits / (last + 1)).sum() / hits[-1])


def _share(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None


def _cells(true: Any, made: Any, right: Any) -> dict[str, float | None]:
    """Recall and precision; precision is None where nothing was made, both where nothing is true."""
    return {'recall': _share(right, true), 'precision': _share(right, made) if true else None}


def _head(true: np.ndarray, said: np.ndarray) -> dict[str, float | None]:
    """Means of what is said and true of n frames, and the average precision; an event is a true
    value above 0.
    """
    if not len(true):
        return {'said': None, 'true': None, 'ap': None}
    means = {'said': float(said.mean(dtype=np.float64)), 'true': float(true.mean(dtype=np.float64))}
    return {**means, 'ap': average_precision(said, true > 0)}


def numbers(e: EventCounts, channels: Sequence[str]) -> dict[str, Any]:
    """The trust numbers of one seed: per channel the tokenizer's and the dream's cells, and both
    heads.
    """
    spans = [slice(first - 1, last) for first, last in STEPS]
    total = e.cells.sum(1)
    pooled = np.stack([e.cells[:, span].sum(1) for span in spans])
    found: dict[str, Any] = {
        'frames': [int(e.valid[:, span].sum()) for span in spans],
        'channels': [],
    }
    for i, name in enumerate(channels):
        dream = [_cells(x[0], x[3], x[4]) for x in pooled[..., i]]
        found['channels'].append({'name': name, 'tokenizer': _cells(*total[:3, i]), 'dream': dream})
    for name, (true, recorded, dreamed), known in (
        ('reward', e.reward, e.paid),
        ('end', e.end, e.valid),
    ):
        found[name] = {
            'recorded': _head(true[known], recorded[known]),
            'dream': [
                _head(true[:, span][known[:, span]], dreamed[:, span][known[:, span]])
                for span in spans
            ],
        }
    return found


def over_seeds(each: Sequence[Any]) -> Any:
    """Trees of numbers, one of each seed, as one whose leaves are {'mean', 'per_seed'}; names and
    counts stay.

    The mean is over the seeds that have the number.
    """
    first = each[0]
    if isinstance(first, Mapping):
        return {name: over_seeds([tree[name] for tree in each]) for name in first}
    if isinstance(first, list):
        return [over_seeds(list(trees)) for trees in zip(*each, strict=True)]
    if isinstance(first, str | int):
        return first
    known = [x for x in each if x is not None]
    return {'mean': float(np.mean(known)) if known else None, 'per_seed': list(each)}


def measure(
    model: Callable[[Params], Judge],
    params: Params,
    source: Dataset,
    key: PRNGKeyArray,
    *,
    context: int,
    channels: Sequence[str] = (),
    windows: int = WINDOWS,
    rows: int = ROWS,
) -> dict[str, Any]:
    """The trust numbers of all seeds, params [seeds, ...], on uniformly drawn windows, the same for
    every seed.

    model: weights of one seed -> its world model; traced. source: of boolean grids [h, w, c].
    context: C, frames
    given. windows: how many, rounded up to whole chunks of `rows`, which bound the memory. Returns
    `windows`, `context`, `steps` and `frames` of each pooled span, `channels` [name, tokenizer,
    dream] and `reward` and `end` [recorded, dream]; a dream has one entry for each span. Leaves are
    {'mean', 'per_seed'}, with None where there was nothing to be found.
    """
    rows = min(rows, windows)
    length, seeds = context + HORIZON, len(jax.tree.leaves(params)[0])

    @jax.jit
    def chunk(params: Params, data: Any, loaded: Any, key: PRNGKeyArray) -> EventCounts:
        key_draw, key_model = jax.random.split(key)
        return examine(
            model(params), source.draw(data, loaded, key_draw, rows, length), context, key_model
        )

    found: list[list[EventCounts]] = [[] for _ in range(seeds)]
    chunks = -(-windows // rows)
    for i in range(chunks):
        loaded = jax.tree.map(lambda x: x[0, 0], source.load(1, rows, length, 1))
        for seed in range(seeds):
            one = jax.tree.map(lambda x, seed=seed: x[seed], params)
            found[seed].append(
                jax.device_get(chunk(one, source.data, loaded, jax.random.fold_in(key, i)))
            )
    names = [
        *channels,
        *(f'channel {i}' for i in range(len(channels), found[0][0].cells.shape[-1])),
    ]
    each = [numbers(_join(parts), names) for parts in found]
    head = {'windows': chunks * rows, 'context': context, 'steps': [list(span) for span in STEPS]}
    return head | over_seeds(each)


def _join(parts: Sequence[EventCounts]) -> EventCounts:
    """The evidence of all chunks."""
    cells = np.sum([part.cells for part in parts], 0, dtype=np.int64)
    rows = [
        np.concatenate([getattr(p, name) for p in parts], -2)
        for name in ('valid', 'paid', 'reward', 'end')
    ]
    return EventCounts(rows[0], rows[1], cells, rows[2], rows[3])


# ---------------------------------------------------------------- judgements


def off(said: float | None, true: float | None) -> bool:
    """Whether a head is wrong by more than a third, on either side."""
    return (
        said is not None
        and true is not None
        and true != 0
        and not 1 / RATIO <= said / true <= RATIO
    )


def faint(recall: float | None) -> bool:
    """Whether more than half of the cells are lost."""
    return recall is not None and recall < RECALL


def warnings(trust: Mapping[str, Any]) -> list[str]:
    """A sentence for each head that is off on recorded frames and each channel that loses its
    cells, by worst seed.
    """
    found = []
    whose = lambda bad, seeds: f' (worst of {len(bad)} such seeds of {seeds})' if seeds > 1 else ''
    for name in HEADS:
        said, true = (trust[name]['recorded'][which]['per_seed'] for which in ('said', 'true'))
        if bad := [i for i in range(len(said)) if off(said[i], true[i])]:
            worst = max(bad, key=lambda i: abs(math.log(max(said[i] / true[i], 1e-9))))
            rates = f'{number(said[worst])} a recorded frame where {number(true[worst])} is true'
            found.append(f'{name} head says {rates}{whose(bad, len(said))}')
    for channel in trust['channels']:
        kept, dreamed = (
            x['recall']['per_seed'] for x in (channel['tokenizer'], channel['dream'][0])
        )
        if bad := [i for i in range(len(kept)) if faint(kept[i]) or faint(dreamed[i])]:
            worst = min(bad, key=lambda i: kept[i] + (dreamed[i] or 0.0))
            shares = f'{percent(kept[worst])} by the tokenizer, {percent(dreamed[worst])} at the first dreamed step'
            found.append(f'recall of {channel["name"]}: {shares}{whose(bad, len(kept))}')
    return found


def steps(trust: Mapping[str, Any], i: int) -> str:
    """'step 1', 'steps 2 to 4'."""
    first, last = trust['steps'][i]
    return f'step {first}' if first == last else f'steps {first} to {last}'


def summary(trust: Mapping[str, Any]) -> str:
    """The channels that are kept least and the calibration of the heads, means over seeds, in one
    line.
    """
    channels = trust['channels']
    places = [('by the tokenizer', [channel['tokenizer'] for channel in channels])]
    places += [
        (f'at dreamed {steps(trust, i)}', [channel['dream'][i] for channel in channels])
        for i in (0, -1)
    ]
    least = []
    for where, cells in places:
        recalls = [
            (x['recall']['mean'], channel['name'])
            for x, channel in zip(cells, channels, strict=True)
        ]
        if known := [pair for pair in recalls if pair[0] is not None]:
            recall, name = min(known)
            least.append(f'{percent(recall)} {where} ({name})')
    rates = [
        (name, *(trust[name]['recorded'][which]['mean'] for which in ('said', 'true')))
        for name in HEADS
    ]
    ratios = [
        f'{name} {said / true:.2f}' if said is not None and true else f'{name} –'
        for name, said, true in rates
    ]
    return f'least recall of a channel: {", ".join(least) or "–"}; said / true on recorded frames: {", ".join(ratios)}'


def lines(trust: Mapping[str, Any]) -> list[str]:
    """The terminal's lines: the summary, then the warnings."""
    return [f'trust {summary(trust)}', *(f'trust WARNING {text}' for text in warnings(trust))]


def exploited(rows: Mapping[int, Mapping[str, Any]]) -> list[int | None]:
    """For each seed the update from which on imagination may exploit the model, None where it does
    not.

    rows: the metrics of the phase by update. From that update on the policy has been more than 1
    nat away from its prior, and the dreamed return, less the prior's where that is logged, is
    higher on average after it than before.
    """
    names = [
        name
        for name in ('imag/kl', 'imag/return', 'imag/return_prior')
        if any(name in r for r in rows.values())
    ]
    complete = {
        step: row for step, row in sorted(rows.items()) if all(name in row for name in names)
    }
    if names[:2] != ['imag/kl', 'imag/return'] or len(complete) < 2:
        return []
    table = [
        [row.get(f'{name}/seeds') or [row[name]] for name in names] for row in complete.values()
    ]
    kl, ret, *prior = np.moveaxis(np.array(table, float), 1, 0)  # [rows, seeds]; null is NaN
    gain = ret - prior[0] if prior else ret
    found: list[int | None] = []
    for seed in range(kl.shape[1]):
        far = np.flatnonzero(kl[:, seed] > KL)
        at = max(far[0], 1) if len(far) else len(kl)  # one record at least to compare with
        rises = at < len(kl) and np.nanmean(gain[at:, seed]) > np.nanmean(gain[:at, seed])
        found.append(list(complete)[far[0]] if rises else None)
    return found


# ---------------------------------------------------------------- the section of the report


def _cell(text: str, low: bool = False) -> str:
    return f'<td class="low">{text}</td>' if low else f'<td>{text}</td>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """heads and rows: cells as HTML."""
    body = ''.join(f'<tr>{"".join(row)}</tr>' for row in rows)
    return f'<div class="scroll"><table><thead>{"".join(heads)}</thead><tbody>{body}</tbody></table></div>'


def _channel_table(trust: Mapping[str, Any]) -> str:
    """Recall / precision of each channel: tokenizer, then the dreamed steps."""
    places = ['tokenizer', *(steps(trust, i) for i in range(len(trust['steps'])))]
    heads = ['<tr><th>Channel</th>', *(f'<th>{place}</th>' for place in places), '</tr>']
    share = lambda x: '–' if x is None else f'{x:.2f}'
    rows = []
    for channel in trust['channels']:
        cells = [
            {k: v['mean'] for k, v in x.items()} for x in (channel['tokenizer'], *channel['dream'])
        ]
        texts = [f'{share(x["recall"])} / {share(x["precision"])}' for x in cells]
        name = _cell(escape(channel['name']))
        rows.append(
            [name, *(_cell(t, faint(x['recall'])) for t, x in zip(texts, cells, strict=True))]
        )
    return _table(heads, rows)


def _head_table(trust: Mapping[str, Any]) -> str:
    """Said, true and average precision of rewards and ends: on recorded frames, then in dreams."""
    heads = ['<tr><th></th><th></th>', *(f'<th colspan="3">{name}</th>' for name in HEADS), '</tr>']
    heads += [
        '<tr><th></th><th>frames</th>',
        '<th>said</th><th>true</th><th>AP</th>' * len(HEADS),
        '</tr>',
    ]
    places = [('recorded', sum(trust['frames']), [trust[name]['recorded'] for name in HEADS])]
    for i, frames in enumerate(trust['frames']):
        places.append(
            (f'dreamed {steps(trust, i)}', frames, [trust[name]['dream'][i] for name in HEADS])
        )
    rows = []
    for where, frames, found in places:
        cells = [_cell(where), _cell(f'{frames:,}')]
        for head in found:
            said, true, ap = (head[which]['mean'] for which in ('said', 'true', 'ap'))
            precision = '–' if ap is None else f'{ap:.2f}'
            cells += [_cell(number(said), off(said, true)), _cell(number(true)), _cell(precision)]
        rows.append(cells)
    return _table(heads, rows)


def _exploits(run: Run) -> list[str]:
    found = exploited(run.metrics.get('imagine', {}))
    whose = lambda i: (
        'the policy' if len(found) == 1 else f'the policy of seed {i + 1} of {len(found)}'
    )
    return [
        f'From update {at:,} of imagination on {whose(i)} is more than {KL:g} nat (KL) away from its prior while the '
        'dreamed return rises: it may have learnt errors of the model, for which the real environment does not pay.'
        for i, at in enumerate(found)
        if at is not None
    ]


def section(run: Run) -> str:
    """What dreams keep and how well the heads are calibrated; for agents that learn from a dataset."""
    if 'env_options' in run.config:
        return ''
    out, trust = ['<section><h2>Can this dream be trusted?</h2>'], run.scores.get('trust')
    out += [f'<p class="missing">{escape(text)}</p>' for text in _exploits(run)]
    if not isinstance(trust, dict):
        return ''.join(
            [
                *out,
                missing(run, 'scores.json', 'trust numbers, which are taken on boolean grids'),
                '</section>',
            ]
        )
    seeds = len(trust['reward']['recorded']['said']['per_seed'])
    out.append(
        f'<p>{trust["windows"]:,} windows of recorded play: {trust["context"]} frames are given, {HORIZON} dreamed '
        'under the recorded actions and compared until the episode ends'
        f'{f"; means over {seeds} seeds" if seeds > 1 else ""}. The environment has chance of its own, so even a '
        'perfect model does not keep every cell.</p>'
    )
    if said := warnings(trust):
        sentences = '<br>'.join(f'{escape(text[0].upper() + text[1:])}.' for text in said)
        out.append(f'<p class="missing">{sentences}</p>')
    out.append('<h3>Cells: recall / precision</h3>')
    out.append(
        '<p class="note">Tokenizer: the same frames, encoded and decoded. Coloured: more than half are lost.</p>'
    )
    out += [_channel_table(trust), '<h3>Rewards and ends, a frame</h3>']
    out.append(
        '<p class="note">Said and true: means of the head and of the data. AP: average precision of what is said for '
        'an event (a positive reward, an end). Coloured: off by more than a third.</p>'
    )
    return ''.join([*out, _head_table(trust), '</section>'])
