"""List of the measurements of docs/RESULTS.md, in order of value; `results/run.py` (`make results`)
runs those that are not recorded.

Raise `revision` when a change moves what an experiment measures. Renamed fields and new commits
make nothing stale.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Commands, run one after the other in a fresh clone, that leave `results/<name>.json`."""

    name: str
    templates: tuple[str, ...]
    """Commands as typed in a checkout, {seeds} and {results} to be filled in; each continues its
    work when it is run again."""
    proves: str
    """Statement that the results support."""
    minutes: float
    """Expected time of all commands on two cores that are shared, or on one GPU."""
    seeds: int = 1
    device: str = 'cpu'
    """'cpu' or 'gpu'."""
    revision: int = 1
    """Number of the definition; 0 for measurements from before the queue."""

    @property
    def results(self) -> str:
        return f'results/{self.name}.json'

    @property
    def commands(self) -> list[str]:
        return [
            template.format(seeds=self.seeds, results=self.results) for template in self.templates
        ]


GAMES = ('breakout', 'asterix', 'freeway', 'seaquest', 'space_invaders')


def dreamer_v3_small(game: str) -> Experiment:
    train = f'reverie train dreamer_v3_small --env minatar/{game} --frames 1e5'
    return Experiment(
        f'dreamer_v3_small/minatar_{game}',
        (train + ' --seeds {seeds} --score-every 1e4 --results {results}',),
        'Dreamer V3 learns a game from 100,000 frames',
        minutes=50,
        seeds=3,
        revision=2,
    )


def dreamer4_demo(game: str, seeds: int, minutes: float, ppo_frames: str = '200e3') -> Experiment:
    collect = f'reverie collect --env minatar/{game} --kind mixed --frames 200e3 --ppo-frames {ppo_frames}'
    train = f'reverie train dreamer4_demo --env minatar/{game} --data datasets/demo-{game}'
    return Experiment(
        f'dreamer4_demo/minatar_{game}',
        (
            f'{collect} --out datasets/demo-{game} --overwrite',
            train + ' --seeds {seeds} --results {results}',
            train.replace('dreamer4_demo', 'bc_demo') + ' --seeds {seeds} --add-to {results}',
        ),
        'imagination improves on the clone it begins with',
        minutes=minutes,
        seeds=seeds,
    )


def ppo(game: str, frames: str, name: str, minutes: float) -> Experiment:
    command = f'python benchmarks/ppo.py --env minatar/{game} --train-frames {frames}'
    return Experiment(
        f'ppo/minatar_{game}-minatar-default-{name}',
        (command + ' --seeds {seeds}',),
        f'random play and PPO after {float(frames):,.0f} frames',
        minutes=minutes,
        seeds=3,
    )


def rejax(game: str) -> Experiment:
    options = '--env-options protocol=gymnax --setting rejax --train-frames 10485760'
    return Experiment(
        f'ppo/minatar_{game}-gymnax-rejax-10.5m',
        (f'python benchmarks/ppo.py --env minatar/{game} {options} ' + '--seeds {seeds}',),
        "PPO with another library's settings plays as well as that library's",
        minutes=60,
        seeds=5,
    )


def swingup(preset: str, frames: str, episodes: int) -> Experiment:
    options = f'--env control/cartpole_swingup --env-options action_repeat=8 --frames {frames} --episodes {episodes}'
    return Experiment(
        f'{preset}/control_cartpole_swingup',
        (f'reverie train {preset} {options} ' + '--results {results}',),
        'a continuous task is learned from its state',
        minutes=20,
    )


def cue(name: str, steps: int, frames: str, seeds: int, first: str = '') -> Experiment:
    train = f'reverie train transdreamer_v3_small --env memory/{steps} --frames {frames}{first}'
    return Experiment(
        f'transdreamer_v3_small/{name}',
        (train + ' --seeds {seeds} --max-steps 50 --results {results}',),
        f'a transformer remembers a cue for {steps} steps',
        minutes=10 * seeds,
        seeds=seeds,
    )


# What one change alone, and all of them, do to the demo's world model.
CHANGES = {
    'time_first': '--config.tokenizer.time-first',
    'unit_latents': '--config.tokenizer.cache-latents --config.tokenizer.unit-latents',
    'mixed_steps': '--config.mixed-steps',
    'action_init': '--config.dynamics.action-init 0.5',
}
ALL = ' '.join(CHANGES.values())
ARMS = {
    'demo': '',
    **CHANGES,
    'all': ALL,
    'all_no_context': f'{ALL} --config.context-frame-rate 0',
    'all_long_tokenizer': f'{ALL} --config.tokenizer-phase.steps 2400',
    'all_more_latents': f'{ALL} --config.tokenizer.latents 8 --config.dynamics.pack 8',
}


def ablation(game: str, arm: str, ppo_frames: str = '200e3') -> Experiment:
    collect = f'reverie collect --env minatar/{game} --kind mixed --frames 200e3 --ppo-frames {ppo_frames}'
    train = f'reverie train dreamer4_demo --env minatar/{game} --data datasets/demo-{game} --config.no-policy'
    return Experiment(
        f'ablation/minatar_{game}-{arm}',
        (
            f'{collect} --out datasets/demo-{game} --overwrite',
            f'{train} {ARMS[arm]}'.rstrip() + ' --seeds {seeds} --results {results}',
        ),
        'cells that the tokenizer and its dreams keep, with one change, with all, with none',
        minutes=30,
        seeds=3,
    )


# Recordings of people, rendered by an engine; the extras `video` and `lpips` must be installed.
DOOM = (
    'python examples/doom/fetch.py --into .doom/packages',
    'python examples/doom/render.py --packages .doom/packages --out .doom/clips',
)
IMPORT = (
    'reverie data import video .doom/clips --out datasets/doom --size 64x64 --fit stretch '
    '--holdout MAP10 --name doom --overwrite'
)
MIRRORED = ('python examples/doom/mirror.py .doom/clips', IMPORT)
# levels of the first of the two games; what is held out is a level of the second
FIRST_GAME = ' '.join(f'{level} {level}_mirrored' for level in ('E1M4', 'E2M3', 'E3M3', 'E4M6'))


def doom(preset: str, minutes: float, *bring: str, device: str = 'cpu') -> Experiment:
    """World model of people's play, from a dataset that the last commands bring in."""
    train = f'reverie train {preset} --data datasets/doom'
    return Experiment(
        f'doom/{preset}',
        (*DOOM, *bring, train + ' --seeds {seeds} --results {results}'),
        'dreams of a recording that was held out follow its actions',
        minutes=minutes,
        device=device,
        revision=2 if preset == 'dreamer4_image' else 1,
    )


def labels(
    name: str, first: tuple[str, ...], options: str, proves: str, minutes: float
) -> Experiment:
    return Experiment(
        f'labels/{name}',
        (*first, f'python benchmarks/labels.py {options}' + ' --seeds {seeds} --results {results}'),
        proves,
        minutes=minutes,
        seeds=3,
    )


def split(game: str) -> str:
    collect = f'reverie collect --env minatar/{game} --kind mixed --frames 200e3 --ppo-frames 200e3'
    return f'{collect} --holdout 0.1 --out datasets/split-{game} --overwrite'


LABELS = 'with few labels a world model dreams almost as well as with all'
DOOM_LABELS = '--data datasets/doom --preset dreamer4_image'


def bench(name: str, proves: str, *commands: str) -> Experiment:
    return Experiment(f'bench/{name}', commands, proves, minutes=10, revision=0)


# beside the file, `reverie/demo` in the clone: the weights of the package
DEMO_WEIGHTS = bench(
    'demo_weights',
    'the model that comes with the package plays as well as the run it is rounded from',
    'reverie collect --env minatar/breakout --kind mixed --frames 200e3 --ppo-frames 200e3 '
    '--out datasets/demo-breakout --overwrite',
    'reverie train dreamer4_demo --env minatar/breakout --data datasets/demo-breakout',
    'python results/pack_demo.py runs/dreamer4_demo-minatar_breakout --results {results}',
)
# the official code's milliseconds on an H100 stand beside ours
V3_STEPS = ('image-12m', 'vector-12m', 'vector-1m', 'image-200m')
V3_STEP = 'python benchmarks/dreamer_v3.py --presets dreamer_v3 --no-play --out {results} --steps'
ON_GPU = [
    Experiment(
        'bench/dreamer_v3_gpu',
        tuple(f'{V3_STEP} {step}' for step in V3_STEPS),
        'an update of Dreamer V3 is faster than the official one',
        minutes=5,
        device='gpu',
    ),
    Experiment(
        'bench/dreamer4_gpu',
        ('reverie bench --preset dreamer4 --no-cache --out {results}',),
        'the first update of every phase comes within 20 s',
        minutes=4,
        device='gpu',
    ),
]


EXPERIMENTS = [
    *(dreamer_v3_small(game) for game in GAMES),
    dreamer4_demo('breakout', seeds=3, minutes=80),
    dreamer4_demo('space_invaders', seeds=3, minutes=80),
    dreamer4_demo('asterix', seeds=1, minutes=30, ppo_frames='3e6'),
    *(ablation(game, arm) for game in ('breakout', 'space_invaders') for arm in ARMS),
    *(ablation('asterix', arm, ppo_frames='3e6') for arm in ARMS),
    labels(
        'minatar_breakout',
        (split('breakout'),),
        '--data datasets/split-breakout --preset dreamer4_demo',
        LABELS,
        minutes=100,
    ),
    doom('dreamer4_image', 60, *MIRRORED),
    labels('doom', (*DOOM, *MIRRORED), f'{DOOM_LABELS} --stretch 48', LABELS, minutes=480),
    labels(
        'doom_games',
        (*DOOM, *MIRRORED),
        f'{DOOM_LABELS} --fractions 0 1 --labelled-files {FIRST_GAME}',
        'actions learnt in one game move another, of which there is only video',
        minutes=370,
    ),
    # a dataset of less than 30 MB, which can be taken to a machine without a network
    doom('dreamer4_image_gpu', 9, f'{IMPORT} --lossy', device='gpu'),
    *ON_GPU,
    *(rejax(game) for game in ('breakout', 'asterix')),
    *(ppo(game, '100e3', '0.1m', minutes=1) for game in GAMES),
    *(ppo(game, '1e6', '1m', minutes=3) for game in GAMES),
    *(ppo(game, '10e6', '10m', minutes=20) for game in GAMES),
    swingup('planet_small', '1e4', episodes=16),
    swingup('dreamer_v1_small', '20e3', episodes=32),
    cue('memory_32', 32, '2.5e5', seeds=3),
    cue('memory_32_seeds_3_to_5', 32, '2.5e5', seeds=3, first=' --seed 3'),
    cue('memory_8', 8, '1e5', seeds=1),
    bench(
        'dreamer4_demo_cpu',
        'speed of every phase, and of imagination with the cache',
        'reverie bench --preset dreamer4_demo --out {results}',
    ),
    DEMO_WEIGHTS,
    bench(
        'minatar_cpu',
        'steps per second of the games',
        'python benchmarks/minatar.py --out {results}',
    ),
]
