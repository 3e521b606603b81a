"""One agent on one dataset, from training to the report; and a finished run read back."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from reverie.agents import presets
from reverie.agents.dreamer4 import Dreamer4Config
from reverie.data.episodes import Episodes
from reverie.data.sources import open_source
from reverie.envs import device
from reverie.evaluation import report, returns
from reverie.programs.showcase import samples
from reverie.training import checkpoint, metrics, runner
from reverie.types import Env, Params, Source, UserError

# Keys of config.json that may differ when a run continues: where and how, not what.
SAFE = ('command', 'data', 'device', 'date', 'commit', 'versions', *runner.CADENCE)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """preset: the name that `config` started from. data: the dataset; its environment options are the game's too."""

    preset: str
    config: Dreamer4Config
    env_name: str
    data: pathlib.Path
    seed: int = 0
    seeds: int = 1
    label_fraction: float = 1.0
    command: str = ''

    def __post_init__(self):
        if self.seeds < 1:
            raise UserError(f'--seeds {self.seeds}: expected at least 1')
        self.episodes.check(self.env.spec)

    @property
    def episodes(self) -> Episodes:
        return Episodes(self.data)

    @property
    def env(self) -> Env:
        """The game as the dataset was played."""
        recorded = self.episodes.provenance.get('env') or {}
        options = recorded.get('options') or {} if recorded.get('name') == self.env_name else {}
        return device.make(self.env_name, **options)

    @property
    def source(self) -> Source:
        return open_source(self.data, self.env.spec, label_fraction=self.label_fraction)

    def describe(self) -> dict[str, Any]:
        """What config.json says."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        spec = self.env.spec
        return {
            **{k: v for k, v in fields.items() if k in ('preset', 'label_fraction', 'command')},
            **returns.provenance(),
            'env': self.env_name,
            'data': str(self.data),
            'dataset': self.episodes.fingerprint,
            'channels': list(spec.channels),
            'actions': list(spec.actions.meanings),
            'config': dataclasses.asdict(self.config),
        }

    def train(
        self,
        folder: pathlib.Path,
        *,
        updates_per_call: int = 50,
        checkpoint_every_s: float = 120.0,
        log_every_s: float = 5.0,
        tensorboard: bool = False,
        wandb: str | None = None,
    ) -> Params:
        """All phases, continued where a run in `folder` was left; -> params [seeds, ...]."""
        agent = presets.make(self.config, self.env.spec)
        sinks: list[metrics.Sink] = [metrics.Terminal(agent.phases)]
        if tensorboard:
            sinks.append(metrics.TensorBoard(folder / 'tensorboard'))
        if wandb:
            sinks.append(metrics.WandB(folder, wandb, folder.name, self.describe()))
        return runner.run(
            agent, self.source, folder, seed=self.seed, seeds=self.seeds, updates_per_call=updates_per_call,
            checkpoint_every_s=checkpoint_every_s, log_every_s=log_every_s, sinks=sinks, config=self.describe(),
            safe=SAFE,
        )  # fmt: skip

    def evaluate(
        self,
        folder: pathlib.Path,
        params: Params,
        episodes: int = 128,
        max_steps: int = 5000,
        *,
        eval_seed: int = 1000,
        say: Callable[[str], None] = print,
        results: pathlib.Path | None = None,
    ) -> dict[str, Any]:
        """Score every read-out in the real environment beside random, the data and PPO; writes scores.json."""
        agent, env = presets.make(self.config, self.env.spec), self.env
        scores: dict[str, Any] = {}
        known = self.episodes.provenance.get('scores') or {}
        key = jax.random.key(eval_seed)
        random = returns.evaluate(env, returns.RandomActor(env.spec.actions), {}, key, episodes=episodes)
        scores['random'] = random
        kinds = self.episodes.returns()
        fewest = min(map(len, kinds.values()))
        if fewest:  # as many episodes of each kind, so that short ones do not outweigh the rest
            scores['data'] = [r for kind in kinds.values() for r in kind[:fewest]]
        for name, readout in agent.readouts.items():
            scores[name] = {}
            for law, greedy in (('sampled', False), ('greedy', True)):
                played = returns.evaluate_seeds(
                    env, readout.actor, readout.params(params), key,
                    episodes=episodes, max_steps=max_steps, greedy=greedy,
                )  # fmt: skip
                scores[name][law] = played
                cut = f', {played.truncated.mean():.0%} cut at {max_steps} steps' if played.truncated.any() else ''
                say(f'eval  {name:<12} {law:<8} {played.returns.mean():7.2f}{cut}')
        if 'ppo' in known:
            scores['ppo'] = {law: played['returns'] for law, played in known['ppo'].items()}
        log = metrics.read(folder / 'metrics.jsonl')
        record = returns.record(
            preset=self.preset,
            env=self.env_name,
            command=self.command,
            seeds=list(range(self.seed, self.seed + self.seeds)),
            env_frames=self.episodes.frames,
            gradient_steps={phase.name: phase.steps for phase in agent.phases},
            seconds=float(log[-1]['seconds']) if log else 0.0,
            scores=scores,
            dataset={kind: float(np.mean(r)) for kind, r in kinds.items() if r},
            ppo_frames=self.ppo_frames,
        )
        returns.save(folder / 'scores.json', record)
        if results:
            returns.save(results, record)
        return record

    @property
    def ppo_frames(self) -> int | None:
        """Frames that the dataset's PPO, the reference of the normalised score, was trained on."""
        curve = (self.episodes.provenance.get('ppo') or {}).get('curve') or {}
        return int(curve['env_frames'][-1]) if curve else None

    def report(self, folder: pathlib.Path, params: Params) -> pathlib.Path:
        """Draw samples with the first seed's weights and write report.html."""
        agent = presets.make(self.config, self.env.spec)
        first = jax.tree.map(lambda x: x[0], params)
        arrays = samples(agent, first, self.source, jax.random.key(self.seed))
        with open(folder / 'samples.npz', 'wb') as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # NumPy's stub takes them for allow_pickle
        return report.write(folder)


def load(folder: pathlib.Path) -> tuple[Experiment, Params]:
    """A finished run. Raises UserError if there is none, or it was left before its last phase."""
    path = folder / 'config.json'
    if not path.exists():
        raise UserError(f'{folder} is not a run folder, expected a config.json in it')
    saved = json.loads(path.read_text())
    config = restore(type(presets.get(saved['preset'])), saved['config'])
    experiment = Experiment(
        saved['preset'], config, saved['env'], pathlib.Path(saved['data']),
        seed=saved['seed'], seeds=saved['seeds'], label_fraction=saved['label_fraction'], command=saved['command'],
    )  # fmt: skip
    params, meta = checkpoint.load(folder)
    last = presets.make(config, experiment.env.spec).phases[-1].name
    if meta['phase'] != last or not meta['complete']:
        raise UserError(f'{folder} stopped in phase {meta["phase"]} at step {meta["step"]}; train it to its end first')
    return experiment, params


def restore(kind: type, value: dict[str, Any]) -> Any:
    """A nested frozen dataclass from its JSON. Raises UserError for a field that the class does not have."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise UserError(f'config of the run has {unknown}, which {kind.__name__} does not know; of another version?')
    default = kind()

    def of(name: str, x: Any) -> Any:
        sample = getattr(default, name)
        if dataclasses.is_dataclass(sample):
            return restore(type(sample), x)
        if isinstance(sample, tuple):
            return type(sample)(*x) if hasattr(sample, '_fields') else tuple(x)
        return x

    return kind(**{name: of(name, x) for name, x in value.items()})
