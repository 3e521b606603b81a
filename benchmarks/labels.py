"""Actions from few labels: how well a world model dreams when it knows the actions of a share of its
recordings only (Dreamer 4, Fig. 7).

    python benchmarks/labels.py --data datasets/doom --preset dreamer4_image --fractions 0 0.03 0.1 1
      --stretch 48 --seeds 3 --results results/labels/doom.json

One tokenizer is trained, which needs no actions, or taken from the run --tokenizer; then the
dynamics at each fraction. Dreams of the recordings that the dataset holds out are compared with
what happened under their actions. Figures are also put on a scale from 0 (no labels) to 1 (all), as
the paper's are. A model without labels knows the action of no frame, so it dreams without: its
embedding of actions is as it was drawn.
--labelled-files: one more model, which knows the actions of these files alone.

The same command continues: each model is trained by the `reverie train` whose words the results
name, in a folder of its own under --out, and what is finished is not repeated.
"""

import argparse
import json
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from reverie.commands.arguments import whole
from reverie.commands.experiment import Recorded
from reverie.commands.programs import keep_programs
from reverie.commands.terminal import say
from reverie.commands.train import experiment_of, parse_train
from reverie.data import Episodes
from reverie.errors import UserError
from reverie.evaluation.results import provenance, save
from reverie.evaluation.statistics import of_runs
from reverie.io import write_json
from reverie.training.metrics import read
from reverie.training.warm import Init
from reverie.types import Params

EVAL_SEED = 1000  # that of `reverie train` and `reverie eval`
TOKENIZER = 'tokenizer'


class Arm(NamedTuple):
    """One model: its name, and the options that say which actions it knows."""

    name: str
    words: tuple[str, ...]

    @property
    def blind(self) -> bool:
        """Whether it knows no action at all."""
        return self.name == '0'


def arms(args: argparse.Namespace) -> list[Arm]:
    """The models of a command: one for each fraction, and one of the labelled files."""
    found = []
    for fraction in args.fractions:
        words: tuple[str, ...] = ('--label-fraction', f'{fraction:g}')
        if args.stretch and 0 < fraction < 1:
            words += ('--label-stretch', str(args.stretch))
        found.append(Arm(f'{fraction:g}', words))
    if args.labelled_files:
        found.append(Arm('files', ('--labelled-files', *args.labelled_files)))
    return found


def words_of(args: argparse.Namespace, folder: pathlib.Path, seeds: int) -> list[str]:
    """Options of `reverie train` for a world model alone."""
    words = ['--data', str(args.data), '--out', str(folder), '--seeds', str(seeds)]
    words += ['--config.no-policy']
    for pair in args.steps:
        phase, equals, steps = pair.partition('=')
        if not equals or not steps.isdigit():
            raise UserError(f'--steps {pair}: expected phase=updates, e.g. dynamics=6000')
        words += [f'--config.{phase}-phase.steps', steps]
    return words


def train(preset: str, words: Sequence[str]) -> tuple[Recorded, Params]:
    """Train what `reverie train` would with these words, or read it back if it is finished."""
    options = parse_train(preset, *words)
    experiment = experiment_of(options, preset)
    assert isinstance(experiment, Recorded) and options.out is not None
    init = None if options.from_ is None else Init.parse(options.from_)
    return experiment, experiment.train(options.out, init=init)


def measured(args: argparse.Namespace, arm: Arm) -> dict[str, Any]:
    """Train and measure a model; return {'command', 'frames', 'labelled_frames', 'seconds',
    'recordings'}, kept beside its run.
    """
    folder = args.out / arm.name
    tokenizer = args.tokenizer or args.out / TOKENIZER
    words = [*words_of(args, folder, args.seeds), *arm.words, '--from', f'{tokenizer}:{TOKENIZER}']
    command = shlex.join(['reverie', 'train', args.preset, *words])
    note = args.out / f'{arm.name}.json'
    if note.exists() and (known := json.loads(note.read_text()))['command'] == command:
        found: dict[str, Any] = known
        return found
    say(f'labels: {command}')
    experiment, params = train(args.preset, words)
    recordings = experiment.recordings(folder, params, jax.random.key(EVAL_SEED), say)
    if recordings is None:
        raise UserError(f'{args.data}: no recording that is held out is long enough to dream of')
    part = experiment.episodes.only('train')
    found = {
        'command': command,
        'frames': sum(map(len, part.records())),
        'labelled_frames': experiment.labels.frames(part),
        'seconds': float(read(folder / 'metrics.jsonl')[-1]['seconds']),
        'recordings': recordings,
    }
    write_json(note, found)
    return found


def likeness(found: Mapping[str, Any], arm: Arm) -> dict[str, list[float]]:
    """Mean of each metric of the dreams of every seed."""
    under = 'none' if arm.blind else 'true'
    metrics = found['recordings'][0][under]
    return {m: [seed[under][m]['mean'] for seed in found['recordings']] for m in metrics}


def figures(each: Mapping[Arm, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entry of every model in the results; intervals are over seeds."""
    values = {arm: likeness(found, arm) for arm, found in each.items()}
    ends = {arm.name: values[arm] for arm in values if arm.name in ('0', '1')}
    rows = []
    for arm, found in each.items():
        seeds = found['recordings']
        row: dict[str, Any] = {'name': arm.name, 'dreams_under': 'none' if arm.blind else 'true'}
        for metric, of_seeds in values[arm].items():
            row[metric] = of_runs(of_seeds)
            if len(ends) == 2:
                low, high = (of_runs(ends[name][metric])['mean'] for name in ('0', '1'))
                scaled = [(x - low) / (high - low) for x in of_seeds]
                row[metric]['normalised'] = of_runs(scaled)
        for name, metrics in seeds[0]['differences'].items():
            row[name] = {
                m: of_runs([seed['differences'][name][m]['mean'] for seed in seeds])
                for m in metrics
            }
        for part in seeds[0].get('steering', {}):
            right = [seed['steering'][part]['right'] for seed in seeds]
            row.setdefault('steering', {})[part] = of_runs(right)
        rows.append(row | dict(found))
    return rows


def run(args: argparse.Namespace) -> None:
    """Train and measure every model; write the results after each."""
    whole('seeds', args.seeds)
    if not Episodes(args.data).held_out:
        raise UserError(f'{args.data}: expected recordings that are held out, --holdout makes them')
    if args.tokenizer is None:
        words = words_of(args, args.out / TOKENIZER, 1)
        train(args.preset, [*words, '--config.dynamics-phase.steps', '0'])
    each: dict[Arm, dict[str, Any]] = {}
    for arm in arms(args):
        each[arm] = measured(args, arm)
        jax.clear_caches()  # programs of a model that is done with
        result = {
            'command': shlex.join(['python', *sys.argv]),
            **provenance(),
            'preset': args.preset,
            'seeds': list(range(args.seeds)),
            'gradient_steps': {},
            'seconds': sum(found['seconds'] for found in each.values()),
            'models': figures(each),
        }
        say(f'labels: {arm.name}: {summary(result["models"][-1])}; {save(args.results, result)}')


def summary(row: Mapping[str, Any]) -> str:
    """One model in a line."""
    worth = row.get('true - shuffled', {}).get('psnr', {}).get('mean')
    turned = ''.join(f', {part} {x["mean"]:.0%}' for part, x in row.get('steering', {}).items())
    gain = '' if worth is None else f', true - shuffled {worth:+.2f} dB'
    return f'{row["psnr"]["mean"]:.2f} dB, SSIM {row["ssim"]["mean"]:.3f}{gain}{turned}'


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data', type=pathlib.Path, required=True)
    parser.add_argument('--preset', default='dreamer4_image')
    parser.add_argument('--fractions', type=float, nargs='*', default=[0, 0.03, 0.1, 1])
    parser.add_argument(
        '--stretch', type=int, default=0, help='frames of labelled stretches; 0 for whole episodes'
    )
    parser.add_argument('--labelled-files', nargs='*', default=[], metavar='FILE')
    parser.add_argument('--seeds', type=int, default=3, help='of each model, in one program')
    parser.add_argument('--steps', nargs='*', default=[], metavar='PHASE=UPDATES')
    parser.add_argument('--tokenizer', type=pathlib.Path, metavar='RUN')
    parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/labels'))
    parser.add_argument('--results', type=pathlib.Path, required=True)
    args = parser.parse_args(arguments)
    keep_programs(True)
    try:
        run(args)
    except UserError as error:
        print(f'labels.py: {error}', file=sys.stderr)
        return error.code
    return 0


if __name__ == '__main__':
    sys.exit(main())
