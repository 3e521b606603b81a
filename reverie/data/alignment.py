"""Check that actions stand beside the frames that they led to.

Evidence is how well the action stored with frame t explains the change from frame t + k - 1 to
t + k, for k from -2 to 2. Where the camera is an action, its turn is correlated with the shift of
the picture, which follows it at once. Buttons lead or lag by nature (a gun fires later, a runner
keeps running), so without a camera a shift is said only if the picture does not follow the actions
where they are at all, and every part of the action agrees.

Two errors are weighed by resampling blocks of steps: the best shift must win in 95% of the samples.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from reverie.data.motion import as_pictures, changes, overlapping, shift
from reverie.data.records import Record, Schema, unpack
from reverie.types import ActionSpace

SHIFTS = (-2, -1, 0, 1, 2)
EDGE = 2
BLOCK = 32  # steps that are drawn together: neighbours are alike
SAMPLES = 200
SURE = 0.95  # share of the samples
FEWEST = 8  # blocks
BUDGET = 20_000  # frames that are looked at
WEAK = 0.05  # correlation below which nothing is said
WEAK_GAIN = 0.01  # share of the change below which no shift is said without a camera
DOMINANT = 4.0  # gain of the best shift to that of none, without a camera
RIDGE = 1e-3


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Result of the check: `shift` is 0 if actions fit best where they are, k if they fit k frames
    later, None if that cannot be told.
    """

    shift: int | None
    scores: dict[int, float]  # correlation, or held-out gain, by shift
    line: str


class Alignment:
    """Evidence of a dataset, taken in record by record."""

    def __init__(self, schema: Schema, episodes: int) -> None:
        self.schema = schema
        self.each = max(4 * BLOCK, BUDGET // max(1, episodes))
        self.seen = 0
        space = schema.actions
        self.cameras = [i for i, part in enumerate(space.parts) if part.camera]
        self.names = _names(space)
        self.moved: list[np.ndarray] = []  # for each block [BLOCK + 2 EDGE, features]
        self.acted: list[list[np.ndarray]] = []  # for each block and name [BLOCK + ..., columns]

    def add(self, record: Record) -> None:
        """Look at the beginning of an episode, if it has actions."""
        if not record.has_action or not self.names or self.seen >= 2 * BUDGET:
            return
        length = min(len(record), self.each)
        self.seen += length
        if length < BLOCK + 2 * EDGE + 1:
            return
        obs = unpack(record.obs[:length], self.schema)
        movement = np.concatenate([self._movement(part) for part in overlapping(obs)])
        actions, known = self._actions(record.action[1:length])
        width = BLOCK + 2 * EDGE
        for begin in range(0, len(movement) - width + 1, BLOCK):
            block = slice(begin, begin + width)
            if known[block].all():
                self.moved.append(movement[block])
                self.acted.append([action[block] for action in actions])

    def _movement(self, obs: np.ndarray) -> np.ndarray:
        """Changes into frames 1 to T - 1, [T - 1, features]."""
        if obs.ndim != 4:
            return np.diff(obs.reshape(len(obs), -1)[:, :64].astype(np.float32), axis=0)
        pictures = as_pictures(obs)
        if not self.cameras:
            return changes(pictures)
        grey = pictures.mean(-1)
        axis = {'x': 2, 'y': 1}
        parts = self.schema.actions.parts
        return np.stack([shift(grey, axis[parts[i].camera]) for i in self.cameras], 1)

    def _actions(self, action: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """(for each name [T, columns], whether they are known [T])."""
        space = self.schema.actions
        if space.kind == 'continuous':
            return [_with_size(action)], np.ones(len(action), bool)
        if space.kind == 'discrete':
            return [np.eye(space.size)[np.maximum(action, 0)]], action >= 0
        known = np.ones(len(action), bool)
        found = []
        for i, part in enumerate(space.parts):
            values = action[:, i]
            if part.choices:
                known &= values >= 0
            if self.cameras:
                if i in self.cameras:
                    found.append(values[:, None] - (part.rest if part.choices else 0))
            elif part.choices:
                found.append(np.eye(part.size)[np.maximum(values, 0).astype(int)])
            else:
                found.append(_with_size(values[:, None]))
        return found, known

    def verdict(self) -> Verdict | None:
        """Return the result; None if no step has an action."""
        if not self.names or not self.seen:
            return None
        if len(self.moved) < FEWEST:
            return _unsure(f'{len(self.moved)} blocks of {BLOCK} labelled steps', {})
        moved = np.stack(self.moved).astype(np.float64)
        acted = [np.stack(a).astype(np.float64) for a in zip(*self.acted, strict=True)]
        return self._by_camera(moved, acted) if self.cameras else self._by_change(moved, acted)

    def _by_camera(self, moved: np.ndarray, acted: Sequence[np.ndarray]) -> Verdict:
        """Decide by the correlation of turns with shifts of the picture, squared and summed where
        the camera turns about two axes.
        """
        names = [self.schema.actions.parts[i].name for i in self.cameras]
        sums = np.stack(
            [
                [_moments(moved[:, :, i], turn[:, :, 0], k) for k in SHIFTS]
                for i, turn in enumerate(acted)
            ]
        )  # [cameras, shifts, blocks, 6]
        blocks = sums.shape[2]
        rng = np.random.default_rng(0)
        draws = rng.multinomial(blocks, np.full(blocks, 1 / blocks), SAMPLES)
        strength = (_correlation(np.einsum('cksm,ns->nckm', sums, draws)) ** 2).sum(1)
        whole = (_correlation(sums.sum(2)) ** 2).mean(0) ** 0.5
        scores = dict(zip(SHIFTS, whole.tolist(), strict=True))
        best = max(SHIFTS, key=scores.__getitem__)
        wins = float((strength.argmax(1) == SHIFTS.index(best)).mean())
        by = ' and '.join(names)
        if scores[best] < WEAK or wins < SURE:
            reason = (
                f'{by} best fits at shift {best} (correlation {scores[best]:.2f}), in {wins:.0%} of '
                f'{SAMPLES} resamples'
            )
            return _unsure(reason, scores)
        return _sure(best, scores, f'{by}, correlation', 'correlation')

    def _by_change(self, moved: np.ndarray, acted: Sequence[np.ndarray]) -> Verdict:
        """Decide by what the action of each shift adds to the others' prediction of the change, on
        blocks that were not fitted.
        """
        moved = moved - moved.mean((0, 1))
        moved /= np.maximum(moved.std((0, 1)), 1e-9)
        target = moved[:, EDGE:-EDGE]
        totals, judged = dict.fromkeys(SHIFTS, 0.0), []
        rng = np.random.default_rng(0)
        for action in acted:
            gains = _gains(target, action - action.mean((0, 1)))  # [shifts, blocks]
            blocks = gains.shape[1]
            draws = rng.multinomial(blocks, np.full(blocks, 1 / blocks), SAMPLES) / blocks
            sampled = draws @ gains.T
            clear = (sampled > 0).mean(0) >= SURE
            mean = gains.mean(1)
            for i, k in enumerate(SHIFTS):
                totals[k] += float(mean[i])
            if not clear.any():
                continue
            best = int(np.where(clear, mean, -np.inf).argmax())
            here = SHIFTS.index(0)
            if clear[here] and mean[best] < DOMINANT * mean[here]:
                best = here
            wins = float((sampled.argmax(1) == best).mean())
            alone = best == here or (not clear[here] and wins >= SURE and mean[best] > WEAK_GAIN)
            judged.append(SHIFTS[best] if alone else None)
        if not judged:
            return _unsure('no action explains how the picture changes', totals)
        if len(set(judged)) > 1 or judged[0] is None:
            if 0 in judged and not {-2, -1} & set(judged):  # the rest lag by nature
                return _sure(0, totals, 'buttons, gain', 'gain')
            return _unsure('the picture follows the actions of several frames, or weakly', totals)
        if judged[0] == EDGE:
            return _unsure('the picture follows two frames later, as buttons may by nature', totals)
        return _sure(judged[0], totals, 'buttons, gain', 'gain')


def _names(space: ActionSpace) -> tuple[str, ...]:
    if space.kind == 'composite':
        return tuple(part.name for part in space.parts)
    return (space.kind,)


def _with_size(values: np.ndarray) -> np.ndarray:
    """Numbers [T, n] and their sizes: of a force that goes to and fro, the size is what shows."""
    return np.concatenate([values, np.abs(values)], 1)


def _moments(moved: np.ndarray, turn: np.ndarray, k: int) -> np.ndarray:
    """Sums for a correlation of each block [blocks, BLOCK + 2 EDGE], [blocks, 6]."""
    m, a = moved[:, EDGE + k : EDGE + k + BLOCK], turn[:, EDGE : EDGE + BLOCK]
    columns = (np.ones_like(m), m, a, m * m, a * a, m * a)
    return np.stack([column.sum(1) for column in columns], 1)


def _correlation(sums: np.ndarray) -> np.ndarray:
    """Correlation from sums [..., 6]; 0 where one of the two never varies."""
    n, m, a, mm, aa, ma = np.moveaxis(sums, -1, 0)
    var = (mm - m * m / n) * (aa - a * a / n)
    found: np.ndarray = np.where(var > 1e-9, (ma - m * a / n) / np.sqrt(np.maximum(var, 1e-9)), 0)
    return found


def _gains(target: np.ndarray, action: np.ndarray) -> np.ndarray:
    """Share of the variance [shifts, blocks] that the action of each shift explains beyond the
    others'; target [blocks, BLOCK, features], action [blocks, BLOCK + 2 EDGE, columns].

    Action t of shift k stands beside the change into t + k, so the change at t is paired with
    action t - k. Fitted on every other block, judged on the rest, and the other way round.
    """
    blocks = len(target)
    lags = [action[:, EDGE - k : EDGE - k + BLOCK] for k in SHIFTS]
    columns = action.shape[2]
    design = np.concatenate(lags, 2)
    gains = np.zeros((len(SHIFTS), blocks))
    for fold in (0, 1):
        test = np.arange(blocks) % 2 == fold
        error = _errors(design, target, test)
        spread = float((target[test] ** 2).mean())
        for i in range(len(SHIFTS)):
            kept = np.delete(design, np.s_[i * columns : (i + 1) * columns], 2)
            gains[i, test] = (_errors(kept, target, test) - error) / max(spread, 1e-9)
    return gains


def _errors(design: np.ndarray, target: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Mean squared error of the blocks under test, of a ridge regression on all others."""
    x, y = (z[~test].reshape(-1, z.shape[2]) for z in (design, target))
    ridge = RIDGE * len(x) * np.eye(x.shape[1])
    weights = np.linalg.solve(x.T @ x + ridge, x.T @ y)
    errors: np.ndarray = ((design[test] @ weights - target[test]) ** 2).mean((1, 2))
    return errors


def _unsure(reason: str, scores: dict[int, float]) -> Verdict:
    return Verdict(None, scores, f'cannot tell whether actions stand beside their frames: {reason}')


def _sure(best: int, scores: dict[int, float], by: str, unit: str) -> Verdict:
    beside = f'{by} {scores[best]:.2g}'
    if best == 0:
        near = max(scores[-1], scores[1])
        line = f'actions move the picture: they fit best where they are ({beside}, one frame off {near:.2g})'
        return Verdict(0, scores, line)
    count = {1: 'one', 2: 'two'}[abs(best)]
    frames = 'frame' if abs(best) == 1 else 'frames'
    where = f'{count} {frames} {"later" if best > 0 else "earlier"}'
    line = (
        f'actions look shifted by {count}: they fit best {where} ({beside}, {unit} where they are '
        f'{scores[0]:.2g})'
    )
    return Verdict(best, scores, line)
