"""Trust in dreams: the cells of boolean grids that a world model keeps, and its heads' calibration.

Windows of recorded play are taken in twice: all frames observed, which shows the tokenizer and the
heads alone, and the first C frames observed and H dreamed under the recorded actions. Steps count
until the episode ends.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from reverie.data.source import Dataset
from reverie.evaluation.openloop import dream
from reverie.evaluation.ranking import sentence
from reverie.evaluation.starts import replayed, starts
from reverie.text import number, percent
from reverie.types import Actor, Batch, Env, Params, Prediction, State, Step, WorldModel

WINDOWS = 2048  # at most
ROWS = 256  # windows of a chunk
HORIZON = 16  # dreamed steps
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
    """Counts of H steps of N windows: cells per step and channel, rewards and ends one by one."""

    valid: Any  # [N, H] bool: not beyond the episode's end, and the actions are known
    paid: Any  # [N, H] bool: of these, the steps whose rewards are known
    # [5, H, c] int: true; reconstructed, and true among them; dreamed, and true among them
    cells: Any
    reward: Any  # [3, N, H]: true; said of the recorded frame; said of the dreamed frame
    end: Any  # [3, N, H], likewise


def examine(model: Judge, batch: Batch, context: int, key: PRNGKeyArray) -> EventCounts:
    """Compare windows [N, context + H] of boolean grids with their dreams; traced."""
    swap: Callable[[Array], Array] = lambda x: x.swapaxes(0, 1)
    time_major: Step = jax.tree.map(swap, batch.step)
    keys = jax.random.split(key, (2, len(time_major.reward)))

    def observe(
        carry: tuple[State, State], x: tuple[Step, PRNGKeyArray, Array]
    ) -> tuple[tuple[State, State], tuple[Array, Array]]:
        state, given = carry
        step, key, is_given = x
        state, feat = model.observe(state, step, key)
        given = jax.tree.map(lambda new, old: jnp.where(is_given, new, old), state, given)
        return (state, given), (model.decode(state), feat)

    # one scan that remembers the state the dream begins in: half the compilation of two scans
    start = model.initial(len(batch.step.reward))
    seen = (time_major, keys[0], jnp.arange(len(keys[0])) < context)
    (_, given), (image, feat) = jax.lax.scan(observe, (start, start), seen)
    dreamed = dream(model, given, time_major.prev_action[context:], keys[1, context:])
    dreamed = jax.tree.map(swap, dreamed)
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
    """Sum over distinct scores, from the highest, of the gain in recall times the precision.

    None without events. Equal scores are one threshold, as in scikit-learn's
    `average_precision_score`.
    """
    if not event.any():
        return None
    order = np.argsort(-score, kind='stable')
    # last of each run of equal scores
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    hits = np.cumsum(event[order])[last]
    return float((np.diff(hits, prepend=0) * hits / (last + 1)).sum() / hits[-1])


def _share(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None


def _cells(true: Any, made: Any, right: Any) -> dict[str, float | None]:
    """Recall and precision; the latter None where nothing was made, both where nothing is true."""
    return {'recall': _share(right, true), 'precision': _share(right, made) if true else None}


def _head(true: np.ndarray, said: np.ndarray) -> dict[str, float | None]:
    """Means of a head and of the truth over n frames, and the average precision of events.

    An event is a true value above 0.
    """
    if not len(true):
        return {'said': None, 'true': None, 'ap': None}
    mean: Callable[[np.ndarray], float] = lambda x: float(x.mean(dtype=np.float64))
    return {'said': mean(said), 'true': mean(true), 'ap': average_precision(said, true > 0)}


def numbers(
    e: EventCounts, channels: Sequence[str], heads: Sequence[str] = HEADS
) -> dict[str, Any]:
    """Trust numbers of one seed: the tokenizer's and the dream's cells per channel, the heads."""
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
    judged = {'reward': (e.reward, e.paid), 'end': (e.end, e.valid)}
    for name in heads:
        (true, recorded, dreamed), known = judged[name]
        spans_of = [(true[:, span], dreamed[:, span], known[:, span]) for span in spans]
        found[name] = {
            'recorded': _head(true[known], recorded[known]),
            'dream': [_head(x[kept], said[kept]) for x, said, kept in spans_of],
        }
    return found


def ceiling(
    env: Env, players: Sequence[tuple[Actor, Params]], key: PRNGKeyArray
) -> list[list[dict[str, float | None]]]:
    """Cells that the game itself keeps when it goes on from the same state, under the same actions,
    with other dice: of each channel, recall and precision for each pooled span.

    players: those of the dataset, without memory, who play as many steps each.
    """
    begin = jax.jit(
        functools.partial(starts, env, count=-(-WINDOWS // len(players)), context=1),
        static_argnums=0,
    )
    play = jax.jit(functools.partial(replayed, env, horizon=HORIZON), static_argnums=0)
    counts = np.zeros(1, np.int64)
    for i, (actor, weights) in enumerate(players):
        key_start, key_play = jax.random.split(jax.random.fold_in(key, i))
        counts = counts + np.asarray(
            play(actor, weights, begin(actor, weights, key_start), key_play)
        )
    pooled = [counts[:, first - 1 : last].sum(1) for first, last in STEPS]
    return [[_cells(*x[:, i]) for x in pooled] for i in range(counts.shape[-1])]


def over_seeds(each: Sequence[Any]) -> Any:
    """Merge trees of numbers, one of each seed, into one whose leaves are {'mean', 'per_seed'}.

    Names and counts stay. The mean is over the seeds that have the number.
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
    heads: Sequence[str] = HEADS,
) -> dict[str, Any]:
    """Trust numbers of all seeds, params [seeds, ...], on the same uniformly drawn windows.

    Args:
        model: weights of one seed -> its world model; traced.
        source: of boolean grids [h, w, c].
        context: C, frames given.
        windows: how many, rounded up to whole chunks of `rows`, which bound the memory.
        heads: those that the model has.

    Returns: `windows`, `context`, `steps` and `frames` of each pooled span, `channels` [name,
        tokenizer, dream], and of each head [recorded, dream]; a dream has one entry for each span.
        Leaves are {'mean', 'per_seed'}, None where there was nothing to be found.
    """
    rows = min(rows, windows)
    length, seeds = context + HORIZON, len(jax.tree.leaves(params)[0])

    @jax.jit
    def chunk(params: Params, data: Any, loaded: Any, key: PRNGKeyArray) -> EventCounts:
        key_draw, key_model = jax.random.split(key)
        batch = source.draw(data, loaded, key_draw, rows, length)
        return examine(model(params), batch, context, key_model)

    found: list[list[EventCounts]] = [[] for _ in range(seeds)]
    chunks = -(-windows // rows)
    for i in range(chunks):
        loaded = jax.tree.map(lambda x: x[0, 0], source.load(1, rows, length, 1))
        for seed in range(seeds):
            one = jax.tree.map(lambda x, seed=seed: x[seed], params)
            counts = chunk(one, source.data, loaded, jax.random.fold_in(key, i))
            found[seed].append(jax.device_get(counts))
    names = list(channels)
    names += [f'channel {i}' for i in range(len(names), found[0][0].cells.shape[-1])]
    each = [numbers(_join(parts), names, heads) for parts in found]
    head = {'windows': chunks * rows, 'context': context, 'steps': [list(span) for span in STEPS]}
    over: dict[str, Any] = over_seeds(each)
    return head | over


def _join(parts: Sequence[EventCounts]) -> EventCounts:
    """Counts of all chunks."""

    def rows(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts], -2)

    cells = np.sum([part.cells for part in parts], 0, dtype=np.int64)
    return EventCounts(rows('valid'), rows('paid'), cells, rows('reward'), rows('end'))


# ---------------------------------------------------------------- judgements


def off(said: float | None, true: float | None) -> bool:
    """Whether a head is wrong by more than a third, on either side."""
    if said is None or not true:
        return False
    return not 1 / RATIO <= said / true <= RATIO


def faint(recall: float | None) -> bool:
    """Whether more than half of the cells are lost."""
    return recall is not None and recall < RECALL


def heads_of(trust: Mapping[str, Any]) -> list[str]:
    """Heads that were judged; none of a world model alone."""
    return [name for name in HEADS if name in trust]


def warnings(trust: Mapping[str, Any]) -> list[str]:
    """A sentence for each head that is off on recorded frames and each channel that loses cells.

    Each is about the worst seed.
    """
    found = []

    def whose(bad: Sequence[int], seeds: int) -> str:
        return f' (worst of {len(bad)} such seeds of {seeds})' if seeds > 1 else ''

    for name in heads_of(trust):
        said, true = (trust[name]['recorded'][which]['per_seed'] for which in ('said', 'true'))
        if bad := [i for i in range(len(said)) if off(said[i], true[i])]:
            worst = max(bad, key=lambda i: abs(math.log(max(said[i] / true[i], 1e-9))))
            rates = f'{number(said[worst])} a recorded frame where {number(true[worst])} is true'
            found.append(f'{name} head says {rates}{whose(bad, len(said))}')
    for channel in trust['channels']:
        kept = channel['tokenizer']['recall']['per_seed']
        dreamed = channel['dream'][0]['recall']['per_seed']
        if bad := [i for i in range(len(kept)) if faint(kept[i]) or faint(dreamed[i])]:
            worst = min(bad, key=lambda i: kept[i] + (dreamed[i] or 0.0))
            tokenizer, first = percent(kept[worst]), percent(dreamed[worst])
            shares = f'{tokenizer} by the tokenizer, {first} at the first dreamed step'
            found.append(f'recall of {channel["name"]}: {shares}{whose(bad, len(kept))}')
    return found


def steps(trust: Mapping[str, Any], i: int) -> str:
    """'step 1', 'steps 2 to 4'."""
    first, last = trust['steps'][i]
    return f'step {first}' if first == last else f'steps {first} to {last}'


def summary(trust: Mapping[str, Any]) -> str:
    """The least kept channels and the heads' calibration, means over seeds, in one line."""
    channels = trust['channels']
    places = [('by the tokenizer', [channel['tokenizer'] for channel in channels])]
    for i in (0, -1):
        dreamed = [channel['dream'][i] for channel in channels]
        places.append((f'at dreamed {steps(trust, i)}', dreamed))
    least = []
    for where, cells in places:
        recalls = [cell['recall']['mean'] for cell in cells]
        named = zip(recalls, (channel['name'] for channel in channels), strict=True)
        if known := [pair for pair in named if pair[0] is not None]:
            recall, name = min(known)
            least.append(f'{percent(recall)} {where} ({name})')
    ratios = []
    for name in heads_of(trust):
        said, true = (trust[name]['recorded'][which]['mean'] for which in ('said', 'true'))
        ratios.append(f'{name} {said / true:.2f}' if said is not None and true else f'{name} –')
    said_true = f'; said / true on recorded frames: {", ".join(ratios)}' if ratios else ''
    return f'least recall of a channel: {", ".join(least) or "–"}{said_true}'


def of_ceiling(channel: Mapping[str, Any], i: int) -> float | None:
    """Mean recall of a dreamed span, divided by what the game itself keeps."""
    recall, most = channel['dream'][i]['recall']['mean'], channel['ceiling'][i]['recall']
    return None if recall is None or not most else recall / most


def kept(trust: Mapping[str, Any]) -> str:
    """The least kept channels of dreams beside the game itself, in one line."""
    least = []
    for i in range(len(trust['steps'])):
        shares = [(of_ceiling(channel, i), channel['name']) for channel in trust['channels']]
        if known := [pair for pair in shares if pair[0] is not None]:
            share, name = min(known)
            least.append(f'{percent(share)} at dreamed {steps(trust, i)} ({name})')
    said = ', '.join(least) or '–'
    return f'least recall divided by that of the game under other dice: {said}'


def lines(trust: Mapping[str, Any]) -> list[str]:
    """The terminal's lines: the summary, then the warnings."""
    said = [summary(trust)]
    if 'ceiling' in trust['channels'][0]:
        said.append(kept(trust))
    if 'ranking' in trust:
        said.append(sentence(trust['ranking']))
    return [
        *(f'trust {text}' for text in said),
        *(f'trust WARNING {text}' for text in warnings(trust)),
    ]


def exploited(rows: Mapping[int, Mapping[str, Any]]) -> list[int | None]:
    """The update, for each seed, from which on imagination may exploit the model; None if it never
    does.

    rows: the metrics of the phase by update. From that update on the policy has been more than 1
    nat away from its prior, and the dreamed return, less the prior's where that is logged, is
    higher on average after it than before.
    """
    logged = ('imag/kl', 'imag/return', 'imag/return_prior')
    names = tuple(name for name in logged if any(name in row for row in rows.values()))
    ordered = sorted(rows.items())
    complete = {step: row for step, row in ordered if all(name in row for name in names)}
    if names[:2] != ('imag/kl', 'imag/return') or len(complete) < 2:
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
