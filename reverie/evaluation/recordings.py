"""Dreams of recordings that nothing was trained on, beside what happened: how alike they are, what
their actions are worth, and whether the camera turns.

From each context of a recording the model dreams on under the true actions, under those of another
window, and under none; PSNR, SSIM and LPIPS of each frame are compared with those of the last frame
held still. The recording is long and its frames are alike, so intervals are over blocks of five
seconds (or, without a known rate, of BLOCK frames), each of which counts once.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from reverie.data.episodes import Episodes
from reverie.data.motion import shift
from reverie.data.records import Record, Schema
from reverie.data.windows import HAS_ACTION, HAS_REWARD, Stream, to_batch
from reverie.evaluation.openloop import open_loop
from reverie.evaluation.video import colourise, enlarge, psnr, ssim
from reverie.types import ActionSpace, Params, Step, UserError, WorldModel

CONTEXTS = 64
HORIZON = 16  # dreamed frames
ROWS = 16  # windows of a call
BLOCK_S = 5.0
BLOCK = 80  # frames of a block, where their rate is not known
SHOWN = 4  # windows kept as pictures
TURNED = 1.0  # pixels a frame from which on a camera counts as turned
ACTIONS = ('true', 'shuffled', 'none')

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]  # images [n, h, w, c] -> [n]
Likeness = dict[str, Float[np.ndarray, 'N H']]


class Windows(NamedTuple):
    """Windows [N, C + H] of recordings, and the block that each lies in."""

    step: Step
    block: np.ndarray  # [N]
    has_action: np.ndarray  # [N]


def windows(episodes: Episodes, context: int, fps: float | None) -> Windows:
    """Cut windows from sound episodes, spread evenly, at most one of a block where there are enough.

    Raises UserError if no episode is long enough for one.
    """
    length, span = context + HORIZON, round(BLOCK_S * fps) if fps else BLOCK
    parts: list[Stream] = []
    blocks: list[int] = []
    block = 0
    sound = [r for r in episodes.records() if len(r) >= length]
    if not sound:
        raise UserError(
            f'{episodes.path}: no recording has {length} frames, expected one of {context} frames to '
            f'begin with and {HORIZON} to dream'
        )
    total = sum(len(r) - length + 1 for r in sound)
    step = max(1, total // CONTEXTS)
    for record in sound:
        starts = range(0, len(record) - length + 1, step)
        parts += [_cut(record, start, length) for start in starts]
        blocks += [block + start // span for start in starts]
        block += len(record) // span + 1
    chosen = np.linspace(0, len(parts) - 1, min(CONTEXTS, len(parts))).round().astype(int)
    stacked: Stream = jax.tree.map(lambda *xs: jnp.stack(xs), *[parts[i] for i in chosen])
    made = to_batch(stacked, jnp.zeros(len(chosen), bool), episodes.schema)
    batch = jax.tree.map(np.asarray, made)
    return Windows(batch.step, np.array(blocks)[chosen], batch.has_action)


def _cut(record: Record, start: int, length: int) -> Stream:
    part = slice(start, start + length)
    bits = np.uint8(record.has_action * HAS_ACTION | record.has_reward * HAS_REWARD)
    return Stream(
        record.obs[part], record.action[part], record.reward[part], record.flags[part] | bits
    )


def measure(
    model: Callable[[Params], WorldModel],
    params: Params,
    cut: Windows,
    schema: Schema,
    context: int,
    key: PRNGKeyArray,
    distance: Distance | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Compare dreams of one seed with recordings; return (numbers for JSON, pictures [n, T, ...]).

    distance: LPIPS, if it can be had.
    """
    dreamer = Dreamer(model, params, context, key)
    truth = _unit(cut.step.obs)
    later = truth[:, context:]
    names = ACTIONS if cut.has_action.any() else ('true',)
    dreams = {name: dreamer(acted(cut.step, name, context)) for name in names}
    seen = dreams['true'][:, :context]
    held = np.repeat(truth[:, context - 1 : context], HORIZON, 1)
    found: dict[str, Likeness] = {
        name: likeness(later, image[:, context:], distance) for name, image in dreams.items()
    }
    found['held'] = likeness(later, held, distance)
    tokenizer = likeness(truth[:, context - 1 : context], seen[:, -1:], distance)
    numbers: dict[str, Any] = {
        'contexts': len(truth),
        'blocks': len(np.unique(cut.block)),
        'context': context,
        'horizon': HORIZON,
        'tokenizer': {name: float(x.mean()) for name, x in tokenizer.items()},
        **{name: _summary(x) for name, x in found.items()},
        'differences': {
            f'{a} - {b}': {
                metric: paired(found[a][metric] - found[b][metric], cut.block)
                for metric in found[a]
            }
            for a, b in itertools.combinations(found, 2)
            if a == 'true'
        },
    }
    if steering := steered(dreamer, cut.step, schema.actions, context):
        numbers['steering'] = steering
    kept = slice(0, None, max(1, len(truth) // SHOWN))
    pictures = {'truth': truth[kept][:SHOWN], **{n: x[kept][:SHOWN] for n, x in dreams.items()}}
    return numbers, {name: np.round(255 * x).astype(np.uint8) for name, x in pictures.items()}


class Dreamer:
    """Compiled dreams of windows, ROWS at a time."""

    def __init__(
        self, model: Callable[[Params], WorldModel], params: Params, context: int, key: PRNGKeyArray
    ):
        self.params, self.key = params, key

        def images(params: Params, step: Step, key: PRNGKeyArray) -> Array:
            return jnp.clip(open_loop(model(params), step, context, key).image, 0, 1)

        self.images = jax.jit(images)

    def __call__(self, step: Step) -> Float[np.ndarray, 'N T h w c']:
        n = len(step.reward)
        parts = []
        for begin in range(0, n, ROWS):
            rows = np.minimum(np.arange(begin, begin + ROWS), n - 1)
            part = jax.tree.map(lambda x, rows=rows: x[rows], step)
            image = self.images(self.params, part, jax.random.fold_in(self.key, begin))
            parts.append(np.asarray(image, np.float32)[: n - begin])
        return np.concatenate(parts)


def acted(step: Step, name: str, context: int) -> Step:
    """Windows whose dreamed frames are led to by other actions: those of a window far away, or none
    that is known.
    """
    if name == 'true':
        return step
    action = step.prev_action.copy()
    other = np.roll(action, len(action) // 2, 0)
    action[:, context:] = 0 if name == 'none' else other[:, context:]
    return step._replace(prev_action=action)


def holding(step: Step, space: ActionSpace, context: int, name: str, value: float) -> Step:
    """Windows in whose dreamed frames one part of the action has a value, as it is stored, and all
    others rest.
    """
    values = [value if part.name == name else part.rest for part in space.parts]
    action = step.prev_action.copy()
    action[:, context:] = np.asarray(space.vector(jnp.asarray(values, jnp.float32)))
    return step._replace(prev_action=action)


def _unit(obs: np.ndarray) -> Float[np.ndarray, 'N T h w c']:
    return np.asarray(obs, np.float32) / (255 if obs.dtype == np.uint8 else 1)


def likeness(truth: np.ndarray, image: np.ndarray, distance: Distance | None) -> Likeness:
    """PSNR in dB, SSIM and, if it can be had, LPIPS of every frame [N, H]."""
    found = {'psnr': psnr(truth, image), 'ssim': ssim(truth, image)}
    if distance is not None:
        flat = [x.reshape(-1, *x.shape[2:]) for x in (truth, image)]
        found['lpips'] = np.asarray(distance(*flat)).reshape(truth.shape[:2])
    return found


def _summary(found: Likeness) -> dict[str, Any]:
    """Mean of each metric, and that of each dreamed step."""
    return {
        name: {'mean': float(x.mean()), 'per_step': [float(v) for v in x.mean(0)]}
        for name, x in found.items()
    }


def strip(pictures: Mapping[str, np.ndarray], context: int) -> UInt8[np.ndarray, 'H W 3']:
    """Pictures [n, C + H, h, w, c] of `measure` side by side: for each window a row of what happened
    and one for each sort of actions, from the last given frame on.
    """
    first = next(iter(pictures.values()))
    columns = [context - 1, *(context + i for i in (0, 1, 2, 3, 5, 7, 9, 11, 13, 15))]
    rows = [
        np.concatenate([colourise(images[i, t] / np.float32(255)) for t in columns], 1)
        for i in range(len(first))
        for images in pictures.values()
    ]
    return enlarge(np.concatenate(rows), 2)


def paired(difference: Float[np.ndarray, 'N H'], block: np.ndarray) -> dict[str, Any]:
    """Mean of a difference, and its 95% interval by Student's t over the means of the blocks."""
    each = np.array([difference[block == b].mean() for b in np.unique(block)])
    found: dict[str, Any] = {'mean': float(difference.mean()), 'n': len(each)}
    if len(each) > 1:
        half = scipy.stats.t.ppf(0.975, len(each) - 1) * each.std(ddof=1) / len(each) ** 0.5
        found['ci95'] = [float(each.mean() - half), float(each.mean() + half)]
    return found


def steered(
    dreamer: Callable[[Step], np.ndarray], step: Step, space: ActionSpace, context: int
) -> dict[str, Any]:
    """Turn each camera as far as it goes, one way and the other, in all dreamed frames.

    Returns for each camera the share of dreams whose picture moves the right way by more than
    TURNED pixels a frame, and the mean shifts; nothing for actions without a camera.
    """
    found: dict[str, Any] = {}
    for part in space.parts:
        if not part.camera:
            continue
        shifts = []
        for end in (0, 1):
            value = float(end * (part.size - 1) if part.choices else 2 * end - 1)
            image = dreamer(holding(step, space, context, part.name, value))
            image = image[:, context - 1 :].mean(-1)
            axis = 2 if part.camera == 'x' else 1
            shifts.append(np.array([shift(row, axis).mean() for row in image]))
        less, more = shifts
        right = np.concatenate([less < -TURNED, more > TURNED])
        found[part.name] = {
            'right': float(right.mean()),
            'sign': float(np.concatenate([less < 0, more > 0]).mean()),
            'shift': [float(less.mean()), float(more.mean())],
            'n': len(right),
        }
    return found


def lines(measured: Mapping[str, Any]) -> list[str]:
    """The numbers of one seed as a table for a terminal, a line each."""
    metrics = list(measured['tokenizer'])
    out = [
        f'{measured["contexts"]} contexts of held-out recordings, {measured["horizon"]} frames dreamed'
    ]
    head = '  '.join(f'{m.upper():>6}' for m in metrics)
    out.append(f'{"":<22}{head}')
    rows: list[tuple[str, Sequence[float]]] = [
        ('tokenizer round trip', [measured['tokenizer'][m] for m in metrics])
    ]
    words = {
        'true': 'dream, true actions',
        'shuffled': 'dream, others',
        'none': 'dream, no actions',
        'held': 'last frame held',
    }
    rows += [
        (words[name], [measured[name][m]['mean'] for m in metrics])
        for name in words
        if name in measured
    ]
    for name, values in rows:
        digits = (2 if metric == 'psnr' else 3 for metric in metrics)
        cells = '  '.join(f'{v:6.{n}f}' for v, n in zip(values, digits, strict=True))
        out.append(f'{name:<22}{cells}')
    for name, by in measured['differences'].items():
        psnrs = by['psnr']
        ci = psnrs.get('ci95')
        between = f' ({ci[0]:.2f} to {ci[1]:.2f}, t over {psnrs["n"]} blocks)' if ci else ''
        out.append(f'{name}: {psnrs["mean"]:+.2f} dB{between}')
    for name, turned in measured.get('steering', {}).items():
        less, more = turned['shift']
        out.append(
            f'{name} as far as it goes: the picture follows in {turned["right"]:.0%} of '
            f'{turned["n"]} dreams ({less:+.2f} and {more:+.2f} pixels a frame)'
        )
    return out
