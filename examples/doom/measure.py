"""Does the dreamed gun flash when one fires?  Beside what `reverie eval` measures of any recording.

    python examples/doom/measure.py runs/doom

From contexts of the held-out demo the model dreams on with the trigger held and with nothing held.
A flash follows if the place of the muzzle becomes more orange (red minus blue) with the trigger
held than without, by more than FLASH of full scale. The share is over DRAWS of the dreams' noise: with
one alone it moved between 52 and 67% in the same run.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np
import script
from PIL import Image

from reverie.agents.dreamer4 import Dreamer4
from reverie.commands.experiment import Recorded, load
from reverie.errors import UserError
from reverie.evaluation import video
from reverie.evaluation.recordings import HORIZON, Dreamer, holding, windows

FLASH = 0.1
DRAWS = 5
SCALE = 2  # of the film's pictures
FILMED = 2  # windows
MUZZLE = ((0.55, 0.83), (0.40, 0.60))  # rows and columns of the picture, as shares


def orange(image: np.ndarray) -> np.ndarray:
    """Red minus blue at the muzzle, its brightest tenth: images [N, T, h, w, 3] -> [N, T]."""
    h, w = image.shape[2:4]
    rows, columns = (
        slice(round(low * n), round(high * n))
        for (low, high), n in zip(MUZZLE, (h, w), strict=True)
    )
    place = image[:, :, rows, columns]
    colour = (place[..., 0] - place[..., 2]).reshape(*place.shape[:2], -1)
    brightest = np.sort(colour, -1)[..., -max(1, colour.shape[-1] // 10) :]
    mean: np.ndarray = brightest.mean(-1)
    return mean


def flashes(held: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Whether a flash follows, by window [N]; images [N, T, h, w, 3] of dreamed frames."""
    found: np.ndarray = orange(held).max(1) > orange(rest).max(1) + FLASH
    return found


def film(truth: np.ndarray, dream: np.ndarray) -> np.ndarray:
    """Recorded frames, left, and the dream, right, one window after the other: uint8 [t, H, W, 3]."""
    both = np.concatenate([truth, dream], 3).reshape(-1, *truth.shape[2:3], 2 * truth.shape[3], 3)
    pictures = [Image.fromarray(np.round(255 * x).astype(np.uint8)) for x in both]
    size = (SCALE * both.shape[2], SCALE * both.shape[1])
    return np.stack([np.asarray(x.resize(size, Image.Resampling.BILINEAR)) for x in pictures])


def measure(run: pathlib.Path, gif: pathlib.Path | None) -> None:
    """Measure a run and write `doom.json` into its folder; a GIF of dreams, if one is asked for."""
    experiment, params = load(run)
    agent = experiment.agent
    if not isinstance(experiment, Recorded) or not isinstance(agent, Dreamer4):
        raise UserError(f'{run}: expected a Dreamer 4 trained on recordings')
    space = experiment.spec.actions
    names = [part.name for part in space.parts]
    if 'fire' not in names:
        raise UserError(f'{run}: has the actions {names}, expected fire among them')
    context = agent.cfg.dynamics.transformer.context
    episodes = experiment.episodes.only('held_out' if experiment.episodes.held_out else 'all')
    fps = episodes.provenance['fps']
    step = windows(episodes, context, fps).step
    mine = jax.tree.map(lambda x: x[0], params)
    each = []
    for draw in range(DRAWS):
        dreamer = Dreamer(agent.model, mine, context, jax.random.key(draw))
        fired, rested = (
            dreamer(holding(step, space, context, 'fire', x))[:, context:] for x in (1.0, 0.0)
        )
        each.append(float(flashes(fired, rested).mean()))
    share, contexts = float(np.mean(each)), len(step.reward)
    found = {'flash_follows_fire': share, 'each_draw': each, 'contexts': contexts}
    (run / 'doom.json').write_text(json.dumps(found | {'horizon': HORIZON}, indent=1) + '\n')
    print(
        f'the gun flashes when one fires in {share:.0%} of {contexts} contexts '
        f'({min(each):.0%} to {max(each):.0%} with {DRAWS} draws of the noise)'
    )
    if gif is not None:
        rows = np.linspace(0, len(step.reward) - 1, FILMED + 2).round().astype(int)[1:-1]
        shown = jax.tree.map(lambda x: x[rows], step)
        frames = film(shown.obs / np.float32(255), dreamer(shown))
        gif.write_bytes(video.gif(frames, fps))
        print(f'dreams of {FILMED} windows beside what happened: {gif}')


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('run', type=pathlib.Path, help='folder of a run')
    parser.add_argument('--gif', type=pathlib.Path, help='file to leave a film of dreams in')
    options = parser.parse_args(arguments)
    return script.run('measure.py', lambda: measure(options.run, options.gif))


if __name__ == '__main__':
    sys.exit(main())
