"""Does the dreamed gun flash when one fires?  Beside what `reverie eval` measures of any recording.

    python examples/doom/measure.py runs/doom

From contexts of the held-out demo the model dreams on with the trigger held and with nothing held.
A flash follows if the place of the muzzle becomes more orange (red minus blue) with the trigger
held than without, by more than FLASH of full scale.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import script

from reverie.commands.experiment import load
from reverie.errors import UserError
from reverie.evaluation.openloop import open_loop
from reverie.evaluation.recordings import HORIZON, windows
from reverie.types import Step

FLASH = 0.1
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


def measure(run: pathlib.Path) -> None:
    """Measure a run and write `doom.json` into its folder."""
    experiment, params = load(run)
    space = experiment.spec.actions
    names = [part.name for part in space.parts]
    if 'fire' not in names:
        raise UserError(f'{run}: has the actions {names}, expected fire among them')
    agent = experiment.agent
    context = agent.cfg.dynamics.transformer.context
    episodes = experiment.episodes.only('held_out' if experiment.episodes.held_out else 'all')
    step = windows(episodes, context, episodes.provenance.get('fps')).step
    first = jax.tree.map(lambda x: x[0], params)

    @jax.jit
    def dream(params: dict, step: Step) -> jax.Array:
        model = agent.model(params)
        return jnp.clip(open_loop(model, step, context, jax.random.key(0)).image, 0, 1)

    images = {}
    for name, fire in (('held', 1), ('rest', 0)):
        values = np.array([part.rest for part in space.parts], np.float32)
        values[names.index('fire')] = fire
        action = step.prev_action.copy()
        action[:, context:] = np.asarray(space.vector(jnp.asarray(values)))
        images[name] = np.asarray(dream(first, step._replace(prev_action=action)))[:, context:]
    share = float(flashes(images['held'], images['rest']).mean())
    found = {'flash_follows_fire': share, 'contexts': len(step.reward), 'horizon': HORIZON}
    (run / 'doom.json').write_text(json.dumps(found, indent=1) + '\n')
    print(f'the gun flashes when one fires in {share:.0%} of {len(step.reward)} contexts')


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('run', type=pathlib.Path, help='folder of a run')
    options = parser.parse_args(arguments)
    return script.run('measure.py', lambda: measure(options.run))


if __name__ == '__main__':
    sys.exit(main())
