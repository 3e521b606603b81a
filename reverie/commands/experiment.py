"""One agent in one environment, from training to the report; and a finished run read back."""

import abc
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from reverie.agents import presets
from reverie.agents.dreamer import Dreamer
from reverie.agents.planet import Planet
from reverie.commands import report_samples
from reverie.data.episodes import Episodes
from reverie.data.sources import open_source
from reverie.envs import device
from reverie.envs.host import HostVector
from reverie.envs.suites import FAMILIES
from reverie.evaluation import returns, statistics, tables, trust
from reverie.report import report
from reverie.training import checkpoint, metrics, runner, warm
from reverie.training.legacy import modernise
from reverie.training.online import CollectConfig, Online
from reverie.training.online_host import OnlineHost
from reverie.types import Actor, Env, EnvSpec, HostLive, Live, Params, Source, UserError

# Keys of config.json that may differ when a run continues: where and how, not what.
SAFE = (
    'command',
    'data',
    'max_lost',
    'export',
    'score_every',
    'score_episodes',
    'device',
    'date',
    'commit',
    'versions',
    *runner.CADENCE,
)
SCORE_SEED = (
    500  # of the episodes played while training; those of the final scores have seeds of their own
)
MAX_LOST = (
    0.01  # share of a dataset's episodes that may be damaged: enough for one bad shard of many
)


@dataclasses.dataclass(frozen=True)
class Experiment(abc.ABC):
    """One agent in one environment; `Recorded` and `Played` say where its experience comes from.

    preset: the name that `config` started from.
    """

    preset: str
    config: Any
    env_name: str
    seed: int = 0
    seeds: int = 1
    command: str = ''

    def __post_init__(self):
        if self.seeds < 1:
            raise UserError(f'--seeds {self.seeds}: expected at least 1')

    @property
    @abc.abstractmethod
    def env(self) -> Env:
        """The environment that scores count in."""

    @property
    def spec(self) -> EnvSpec:
        return self.env.spec

    @property
    @abc.abstractmethod
    def source(self) -> Source | Live | HostLive:
        """Where batches come from."""

    @property
    @abc.abstractmethod
    def facts(self) -> dict[str, Any]:
        """What config.json says of the experience."""

    def score(
        self,
        actor: Actor,
        params: Params,
        key: PRNGKeyArray,
        *,
        episodes: int,
        max_steps: int,
        greedy: bool,
    ) -> returns.Scores:
        """Whole episodes in the real environment of every seed, params [seeds, ...]: fields [seeds,
        episodes].
        """
        return returns.evaluate_seeds(
            self.env, actor, params, key, episodes=episodes, max_steps=max_steps, greedy=greedy
        )

    def baselines(self) -> dict[str, Any]:
        """Scores of others to stand beside the agent's, and other fields of the results file under
        ''.
        """
        return {}

    def trust(self, params: Params, key: PRNGKeyArray) -> dict[str, Any] | None:
        """How far the world model's dreams can be trusted, of all seeds; None where that is not
        measured.
        """
        return None

    @abc.abstractmethod
    def draw(self, params: Params, key: PRNGKeyArray) -> dict[str, np.ndarray]:
        """Samples for the report, with one seed's weights."""

    @functools.cached_property
    def agent(self) -> Any:
        return presets.make(self.config, self.spec)

    def describe(self) -> dict[str, Any]:
        """What config.json says."""
        spec = self.spec
        return {
            'preset': self.preset,
            'command': self.command,
            **returns.provenance(),
            'env': self.env_name,
            **self.facts,
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
        init: warm.Init | None = None,
        keep_phase_ends: bool = True,
    ) -> Params:
        """All phases, continued where a run in `folder` was left; -> params [seeds, ...].

        init: the run that phases or parameter groups are taken from, if any.
        """
        agent = self.agent
        sinks: list[metrics.Sink] = [metrics.Terminal(agent.phases)]
        if tensorboard:
            sinks.append(metrics.TensorBoard(folder / 'tensorboard'))
        if wandb:
            sinks.append(metrics.WandB(folder, wandb, folder.name, self.describe()))
        return runner.run(
            agent,
            self.source,
            folder,
            seed=self.seed,
            seeds=self.seeds,
            updates_per_call=updates_per_call,
            checkpoint_every_s=checkpoint_every_s,
            log_every_s=log_every_s,
            sinks=sinks,
            scoring=self.scoring,
            init=init,
            config=self.describe(),
            safe=SAFE,
            keep_phase_ends=keep_phase_ends,
        )

    @property
    def scoring(self) -> runner.Scoring | None:
        """How the agent is scored while it trains, if it is."""
        return None

    def under(self, options: Mapping[str, Any]) -> 'Experiment':
        """The same experiment in the environment with other options.

        Raises UserError if they do not fit the agent.
        """
        raise UserError(
            f'{self.env_name}: {dict(options)} given, but a dataset says which options its game has'
        )

    def evaluate(
        self,
        folder: pathlib.Path,
        params: Params,
        episodes: int = 128,
        max_steps: int = 5000,
        *,
        eval_seed: int = 1000,
        say: Callable[[str], None] = print,
        paths: Sequence[pathlib.Path] = (),
    ) -> dict[str, Any]:
        """Score every read-out in the real environment beside random play and the baselines; writes
        it to `paths`.

        The world model's dreams are measured before, where they can be.
        """
        agent, how = self.agent, dict(episodes=episodes, max_steps=max_steps)
        key = jax.random.key(eval_seed)
        one_seed = {'none': np.zeros(1)}  # random play has no parameters
        random = self.score(
            returns.RandomActor(agent.spec.actions), one_seed, key, greedy=False, **how
        )
        baselines = self.baselines()
        extra = baselines.pop('', {})
        if (measured := self.trust(params, key)) is not None:
            extra['trust'] = measured
            for line in trust.lines(measured):
                say(line)
        scores: dict[str, Any] = {'random': random.returns[0], **baselines}
        for name, readout in agent.readouts.items():
            scores[name] = {}
            for mode, greedy in (('sampled', False), ('greedy', True)):
                played = self.score(
                    readout.actor, readout.params(params), key, greedy=greedy, **how
                )
                scores[name][mode] = played
                short = played.truncated & (
                    played.lengths >= max_steps
                )  # by us, not by the game's own time limit
                cut = f', {short.mean():.0%} cut at {max_steps} steps' if short.any() else ''
                say(
                    f'eval  {name:<12} {mode:<8} {tables.text(statistics.summary(played.returns))}{cut}'
                )
        log = metrics.read(folder / 'metrics.jsonl')
        saved = json.loads((folder / 'config.json').read_text())
        record = returns.record(
            preset=self.preset,
            env=self.env_name,
            command=self.command,
            seeds=list(range(self.seed, self.seed + self.seeds)),
            env_frames=self.frames,
            gradient_steps={name: phase['steps'] for name, phase in saved['phases'].items()},
            seconds=float(log[-1]['seconds']) if log else 0.0,
            scores=scores,
            curve=curve(log, self.seeds),
            **warm.summary(saved),
            **extra,
        )
        for row in tables.difference_rows(record):
            for mode, figure in (('sampled', row.sampled), ('greedy', row.greedy)):
                if figure:
                    say(f'eval  {row.name}, {mode}: {tables.text(figure)}')
        for path in paths:
            returns.save(path, record)
        return record

    @property
    @abc.abstractmethod
    def frames(self) -> int:
        """Environment frames that one seed learns from."""

    def report(self, folder: pathlib.Path, params: Params) -> pathlib.Path:
        """Draw samples with the first seed's weights and write report.html."""
        arrays = self.draw(jax.tree.map(lambda x: x[0], params), jax.random.key(self.seed))
        if arrays:
            with open(folder / 'samples.npz', 'wb') as file:
                # NumPy's stub takes them for allow_pickle
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        return report.write(folder)


@dataclasses.dataclass(frozen=True)
class Recorded(Experiment):
    """The agent learns from a dataset.

    data: the dataset; its environment options are the game's too. max_lost: share of it that may be
    damaged.
    """

    data: pathlib.Path = pathlib.Path('datasets')
    label_fraction: float = 1.0
    max_lost: float = MAX_LOST

    def __post_init__(self):
        super().__post_init__()
        self.episodes.check(self.env.spec)

    @functools.cached_property
    def episodes(self) -> Episodes:
        return Episodes(self.data, self.max_lost)

    @property
    def env(self) -> Env:
        """The game as the dataset was played."""
        recorded = self.episodes.provenance.get('env') or {}
        options = recorded.get('options') or {} if recorded.get('name') == self.env_name else {}
        return device.make(self.env_name, **options)

    @property
    def source(self) -> Source:
        return open_source(self.episodes, self.env.spec, label_fraction=self.label_fraction)

    @property
    def facts(self) -> dict[str, Any]:
        return {
            'data': str(self.data),
            'dataset': self.episodes.fingerprint,
            'label_fraction': self.label_fraction,
            'max_lost': self.max_lost,
        }

    @property
    def frames(self) -> int:
        return self.episodes.frames

    def baselines(self) -> dict[str, Any]:
        """The data itself, and the PPO that made it."""
        found: dict[str, Any] = {}
        known = self.episodes.provenance.get('scores') or {}
        kinds = self.episodes.returns()
        fewest = min(map(len, kinds.values()))
        if fewest:  # as many episodes of each kind, so that short ones do not outweigh the rest
            found['data'] = [r for kind in kinds.values() for r in kind[:fewest]]
        if 'ppo' in known:
            found['ppo'] = {mode: played['returns'] for mode, played in known['ppo'].items()}
        ppo = (self.episodes.provenance.get('ppo') or {}).get('curve') or {}
        found[''] = {
            'dataset': {kind: float(np.mean(r)) for kind, r in kinds.items() if r},
            'ppo_frames': int(ppo['env_frames'][-1]) if ppo else None,
        }
        return found

    def trust(self, params: Params, key: PRNGKeyArray) -> dict[str, Any] | None:
        if not self.episodes.schema.packed:  # not a boolean grid
            return None
        return report_samples.trust_of(self.agent, params, self.source, key, self.frames)

    def draw(self, params: Params, key: PRNGKeyArray) -> dict[str, np.ndarray]:
        return report_samples.of_dataset(self.agent, params, self.source, key)


@dataclasses.dataclass(frozen=True)
class Played(Experiment):
    """The agent learns from what it plays.

    options: of the environment. env_frames: how much is played, prefill included; sets the number
    of updates.
    export: where the replay is left as a dataset, if anywhere.
    score_every: frames between two scores of `score_episodes` sampled episodes while training; 0
    for none.
    score_steps: steps after which such an episode is cut.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    env_frames: int = 100_000
    export: pathlib.Path | None = None
    score_every: int = 0
    score_episodes: int = 32
    score_steps: int = 5000

    @property
    def env(self) -> Env:
        return device.make(self.env_name, **self.options)

    def under(self, options: Mapping[str, Any]) -> 'Played':
        other = dataclasses.replace(self, options={**self.options, **options})
        if other.spec != self.spec:
            raise UserError(
                f'{dict(options)} makes another environment: {other.spec}, the agent knows {self.spec}'
            )
        return other

    @property
    def play(self) -> CollectConfig:
        r = self.config.replay
        return CollectConfig(
            r.envs,
            min(r.capacity, self.env_frames),
            r.ratio,
            r.prefill,
            r.random_prefill,
            context=r.context,
        )

    @functools.cached_property
    def agent(self) -> Dreamer | Planet:
        """With as many updates as the frames allow."""
        presets.make(
            self.config, self.spec
        )  # whether agent and environment fit comes before how much is played
        r, play = self.config.replay, self.play
        one = play.env_frames(1, r.batch, r.length) - play.env_frames(0, r.batch, r.length)
        updates = (self.env_frames - play.env_frames(0, r.batch, r.length)) // one
        if updates < 1:
            raise UserError(
                f'--frames {self.env_frames}: expected at least {play.env_frames(1, r.batch, r.length)}, '
                'the prefill and one update'
            )
        return presets.make(dataclasses.replace(self.config, steps=updates), self.spec)

    @property
    def source(self) -> Live | HostLive:
        return Online(self.env, self.agent.explorer, self.play, self.export, self.provenance)

    @property
    def scoring(self) -> runner.Scoring | None:
        """Sampled episodes of the first read-out, always begun with the same keys."""
        if not self.score_every:
            return None
        readout = next(iter(self.agent.readouts.values()))

        def play(params: Params) -> dict[str, np.ndarray]:
            played = self.score(
                readout.actor, readout.params(params), jax.random.key(SCORE_SEED),
                episodes=self.score_episodes, max_steps=self.score_steps, greedy=False,
            )  # fmt: skip
            return {'score/return': played.returns.mean(1), 'score/length': played.lengths.mean(1)}

        return runner.Scoring(self.score_every, play)

    @property
    def provenance(self) -> dict[str, Any]:
        """What the manifest of the exported replay says."""
        env = {'name': self.env_name, 'options': dict(self.options)}
        return {'source': 'replay', 'preset': self.preset, 'command': self.command, 'env': env}

    @property
    def facts(self) -> dict[str, Any]:
        return {
            'env_options': dict(self.options),
            'env_frames': self.env_frames,
            'export': self.export and str(self.export),
            'score_every': self.score_every,
            'score_episodes': self.score_episodes,
        }

    @property
    def frames(self) -> int:
        r = self.config.replay
        return self.play.env_frames(self.agent.phases[0].steps, r.batch, r.length)

    def draw(self, params: Params, key: PRNGKeyArray) -> dict[str, np.ndarray]:
        return report_samples.of_play(self.agent, params, self.env, key)


@dataclasses.dataclass(frozen=True)
class Hosted(Played):
    """The environments are Gymnasium's, in processes of their own; see `envs.host.HostVector`."""

    @functools.cached_property
    def spec(self) -> EnvSpec:
        with HostVector(self.env_name, 1, **self.options) as vector:
            return vector.spec

    @property
    def source(self) -> HostLive:
        vectors = [
            HostVector(self.env_name, self.play.envs, seed=1000 * (self.seed + i), **self.options)
            for i in range(self.seeds)
        ]
        return OnlineHost(
            vectors,
            self.agent.explorer,
            self.play,
            self.seed,
            dataset=self.export,
            facts=self.provenance,
        )

    def score(
        self,
        actor: Actor,
        params: Params,
        key: PRNGKeyArray,
        *,
        episodes: int,
        max_steps: int,
        greedy: bool,
    ) -> returns.Scores:
        seeds, each = len(jax.tree.leaves(params)[0]), []
        with HostVector(self.env_name, min(8, episodes), seed=10**6, **self.options) as vector:
            for i in range(seeds):
                one = jax.tree.map(lambda x, i=i: x[i], params)
                played = returns.evaluate_host(
                    vector, actor, one, jax.random.fold_in(key, i),
                    episodes=episodes, max_steps=max_steps, greedy=greedy,
                )  # fmt: skip
                each.append(played)
        return returns.Scores(
            *(np.stack([getattr(s, f.name) for s in each]) for f in dataclasses.fields(each[0]))
        )

    def draw(self, params: Params, key: PRNGKeyArray) -> dict[str, np.ndarray]:
        with HostVector(self.env_name, 4, seed=2 * 10**6, **self.options) as vector:
            return report_samples.of_host(self.agent, params, vector, key)


def curve(log: Sequence[Mapping[str, Any]], seeds: int) -> dict[str, Any] | None:
    """Returns while training, from the metrics of a run that plays.

    of: 'score', episodes played to score the agent, if there are such; else 'play', those that
    ended while it learnt.
    """
    name, of = (
        ('score/return', 'score')
        if any('score/return' in r for r in log)
        else ('env/return', 'play')
    )
    rows = [r for r in log if r.get(name) is not None]
    if not rows:
        return None
    each = [r.get(f'{name}/seeds') or [r[name]] for r in rows]
    kept = [(r, x) for r, x in zip(rows, each, strict=True) if len(x) == seeds and None not in x]
    return {
        'of': of,
        'env_frames': [r['env_frames'] for r, _ in kept],
        'seconds': [r['seconds'] for r, _ in kept],
        'return_per_seed': [[x[i] for _, x in kept] for i in range(seeds)],
    }


def played(env_name: str) -> type[Played]:
    """The kind of experiment for an agent that plays this environment."""
    return Hosted if env_name.partition('/')[0] in FAMILIES else Played


def describe(folder: pathlib.Path) -> Experiment:
    """What a run folder was trained with; weights are not read. Raises UserError if it is none."""
    path = folder / 'config.json'
    if not path.exists():
        raise UserError(f'{folder} is not a run folder, expected a config.json in it')
    try:
        saved = modernise(json.loads(path.read_text()))
        config = restore(presets.get(saved['preset']), saved['config'])
        fields = (
            saved['preset'],
            config,
            saved['env'],
            saved['seed'],
            saved['seeds'],
            saved['command'],
        )
        if 'data' in saved:
            lost = saved.get('max_lost', MAX_LOST)
            return Recorded(*fields, pathlib.Path(saved['data']), saved['label_fraction'], lost)
        return played(saved['env'])(
            *fields, options=saved['env_options'], env_frames=saved['env_frames']
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f'{path} cannot be read ({type(error).__name__}: {error}); expected the config of a run'
        ) from error


def load(folder: pathlib.Path) -> tuple[Experiment, Params]:
    """A finished run. Raises UserError if there is none, or it was left before its last phase."""
    experiment = describe(folder)
    params, meta = checkpoint.load(folder)
    last = experiment.agent.phases[-1].name
    if meta['phase'] != last or not meta['complete']:
        raise UserError(
            f'{folder} stopped in phase {meta["phase"]} at step {meta["step"]}; train it to its end first'
        )
    return experiment, params


def restore(like: Any, value: dict[str, Any]) -> Any:
    """A nested frozen dataclass from its JSON; the classes are those of `like`, the preset's own
    value.

    A field that the JSON lacks is newer than the run: it takes its class's default, which is how
    things were before.

    Raises UserError for a field that the class does not have.
    """
    fields = {f.name for f in dataclasses.fields(like)}
    unknown = sorted(set(value) - fields)
    if unknown:
        raise UserError(
            f'config of the run has {unknown}, which {type(like).__name__} does not know; of another version?'
        )

    def of(sample: Any, x: Any) -> Any:
        if dataclasses.is_dataclass(sample):
            return restore(sample, x)
        if isinstance(sample, tuple):
            return type(sample)(*x) if hasattr(sample, '_fields') else tuple(x)
        return x

    newer = {f.name: f.default for f in dataclasses.fields(like) if f.name not in value}
    newer = {name: x for name, x in newer.items() if x is not dataclasses.MISSING}
    return dataclasses.replace(
        like, **newer, **{name: of(getattr(like, name), x) for name, x in value.items()}
    )
