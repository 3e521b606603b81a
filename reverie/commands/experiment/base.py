"""One agent in one environment, from training to the report."""

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

from reverie.agents import registry
from reverie.data.source import Source
from reverie.evaluation import results, returns, statistics, tables, trust
from reverie.evaluation.game import AnyGame
from reverie.io import warn
from reverie.report import write
from reverie.training import metrics, warm
from reverie.training.legacy import read_config
from reverie.training.loop import Scoring
from reverie.training.run import run
from reverie.training.run_folder import CADENCE
from reverie.types import Actor, Agent, EnvSpec, Params, Phase, ReadOut, UserError

Say = Callable[[str], None]

# Keys of config.json that may differ when a run continues: where and how, not what.
SAFE = (
    'command', 'data', 'max_lost', 'export', 'score_every', 'score_episodes', 'device', 'date',
    'commit', 'versions', 'observations', 'game', *CADENCE,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Experiment(abc.ABC):
    """One agent in one environment; `Recorded` and `Played` say where its experience comes from."""

    preset: str  # the name that `config` started from
    config: Any
    env_name: str
    seed: int = 0
    seeds: int = 1
    command: str = ''
    # meta.json of the newest checkpoint of a run that was stopped before its end
    reached: Mapping[str, Any] | None = dataclasses.field(default=None, kw_only=True, compare=False)

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f'--seeds {self.seeds}: expected at least 1')

    @property
    @abc.abstractmethod
    def game(self) -> AnyGame | None:
        """The environment that scores count in; None if it cannot be made."""

    @property
    def unscored(self) -> str | None:
        """The reason why there is no game; None if there is one."""
        return None

    @property
    @abc.abstractmethod
    def spec(self) -> EnvSpec:
        """Facts that the agent is built from."""

    @property
    @abc.abstractmethod
    def source(self) -> Source:
        """Source of the training batches."""

    @property
    @abc.abstractmethod
    def facts(self) -> dict[str, Any]:
        """Entries of config.json about the experience."""

    @property
    @abc.abstractmethod
    def frames(self) -> int:
        """Environment frames that one seed learns from."""

    @functools.cached_property
    def agent(self) -> Agent:
        agent: Agent = registry.make(self.config, self.spec)
        return agent

    def describe(self) -> dict[str, Any]:
        """The run's config.json, without what the runner adds."""
        spec = self.spec
        return {
            'preset': self.preset,
            'command': self.command,
            **results.provenance(),
            'env': self.env_name,
            **self.facts,
            'channels': list(spec.channels),
            'actions': list(spec.actions.meanings),
            **({'observations': list(spec.seen)} if spec.seen else {}),
            'config': dataclasses.asdict(self.config),
        }

    def under(self, options: Mapping[str, Any]) -> 'Experiment':
        """This experiment in the environment with other options.

        Raises UserError if they do not fit the agent.
        """
        raise UserError(
            f'{self.env_name}: {dict(options)} given, but a dataset says which options its game has'
        )

    @property
    def task_name(self) -> str | None:
        """The task that the agent is told; None where there is one."""
        return None

    def told(self, task: str | None = None) -> tuple['Experiment', ...]:
        """This experiment told every task in turn, or the one that is named.

        Raises UserError for a name that is none.
        """
        if task is not None:
            raise UserError(f'--task {task}: {self.preset} plays one game, expected no task')
        return (self,)

    def file_of(self, path: pathlib.Path) -> pathlib.Path:
        """The file for the task that the agent is told, beside that for the first."""
        return path

    # ---------------------------------------------------------------- training

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
        wait_lock_s: float | None = None,
    ) -> Params:
        """Run all phases, from where a run in `folder` was left; return params [seeds, ...].

        init: the run that phases or parameter groups are taken from, if any.
        """
        agent = self.agent
        sinks: list[metrics.Sink] = [metrics.Terminal(agent.phases)]
        if tensorboard:
            sinks.append(metrics.TensorBoard(folder / 'tensorboard'))
        if wandb:
            sinks.append(metrics.WandB(folder, wandb, folder.name, self.describe()))
        return run(
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
            held_out=self.held_out,
            init=init,
            config=self.describe(),
            safe=SAFE,
            keep_phase_ends=keep_phase_ends,
            wait_lock_s=wait_lock_s,
        )

    @property
    def held_out(self) -> Source | None:
        """Recordings that nothing is trained on, whose losses are logged; None without such."""
        return None

    @property
    def scoring(self) -> Scoring | None:
        """Scores taken while the agent trains, if any."""
        return None

    # ---------------------------------------------------------------- scores

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
        """Play whole episodes in the real environment with params [seeds, ...].

        Returns Scores with fields [seeds, episodes].
        """
        if self.game is None:
            raise UserError(f'no scores can be taken: {self.unscored}')
        return self.game.score(
            actor, params, key, episodes=episodes, max_steps=max_steps, greedy=greedy
        )

    @property
    def begun(self) -> tuple[Phase, ...]:
        """Phases that have had an update."""
        phases = self.agent.phases
        if self.reached is None:
            return phases
        return phases[: self.reached['phase_index'] + (self.reached['step'] > 0)]

    @property
    def readouts(self) -> Mapping[str, ReadOut]:
        """Read-outs of the agent all of whose phases have begun."""
        names = {name: name for name in jax.eval_shape(self.agent.init, jax.random.key(0))}
        later = self.agent.phases[len(self.begun) :]
        late = {group for phase in later for group in phase.trains}
        return {
            name: readout
            for name, readout in self.agent.readouts.items()
            if not late & set(jax.tree.leaves(readout.params(names)))
        }

    def baselines(self) -> dict[str, Any]:
        """Scores of others to stand beside the agent's."""
        return {}

    def extra(self) -> dict[str, Any]:
        """More entries of the results file, about the data."""
        return {}

    def trust(self, params: Params, key: PRNGKeyArray) -> dict[str, Any] | None:
        """Trust numbers of the dreams of all seeds; None where they are not taken."""
        return None

    @property
    def has_recordings(self) -> bool:
        """Whether there are recordings to compare dreams with."""
        return False

    def recordings(
        self, folder: pathlib.Path, params: Params, key: PRNGKeyArray, say: Say
    ) -> list[dict[str, Any]] | None:
        """Measure each seed's dreams of recordings; None where there are none."""
        return None

    def evaluate(
        self,
        folder: pathlib.Path,
        params: Params,
        episodes: int = 128,
        max_steps: int = 5000,
        *,
        eval_seed: int = 1000,
        say: Say = print,
        paths: Sequence[pathlib.Path] = (),
    ) -> dict[str, Any]:
        """Score every read-out in the real environment, beside random play and the baselines.

        The world model's dreams are measured before, where they can be. Writes the results file to
        each of `paths` and returns it. Raises UserError for a run that was stopped before it had a
        policy.
        """
        key = jax.random.key(eval_seed)
        if self.unscored is not None:
            say(f'eval  no scores: {self.unscored}')
        elif not self.agent.readouts:
            say('eval  no scores: the agent is a world model alone')
        elif not self.readouts:
            raise UserError(
                f'{folder} stopped in phase {self.stopped}, which is before it has a policy; '
                'expected one to score, train it further'
            )
        elif self.reached is not None:
            say(f'eval  the run stopped in phase {self.stopped}; scored as it is')
        extra = self.extra()
        if self.reached is not None:
            extra['stopped'] = self.stopped
        if (measured := self.trust(params, key)) is not None:
            extra['trust'] = measured
            for line in trust.lines(measured):
                say(line)
        if (dreamed := self.recordings(folder, params, key, say)) is not None:
            extra['recordings'] = dreamed
        log = metrics.read(folder / 'metrics.jsonl')
        saved = read_config(folder)
        record = results.record(
            preset=self.preset,
            env=self.env_name,
            command=self.command,
            seeds=list(range(self.seed, self.seed + self.seeds)),
            env_frames=self.frames,
            gradient_steps=self._updates(saved),
            seconds=float(log[-1]['seconds']) if log else 0.0,
            scores=self._scores(params, key, episodes, max_steps, say),
            curve=curve(log, self.seeds),
            **warm.summary(saved),
            **extra,
        )
        if (scores := self.file_of(folder / 'scores.json')) in paths:
            record = self._beside(record, scores)
        for row in tables.difference_rows(record):
            for mode, figure in (('sampled', row.sampled), ('greedy', row.greedy)):
                if figure:
                    say(f'eval  {row.name}, {mode}: {tables.text(figure)}')
        for path in paths:
            results.save(path, record)
        return record

    @property
    def stopped(self) -> str:
        """Phase and step that a run was left at, e.g. 'imagine at step 40 of 250'."""
        assert self.reached is not None
        phase = self.agent.phases[self.reached['phase_index']]
        return f'{phase.name} at step {self.reached["step"]} of {phase.steps}'

    def _updates(self, saved: Mapping[str, Any]) -> dict[str, int]:
        """Updates of each phase that has had some."""
        steps = {name: int(phase['steps']) for name, phase in saved['phases'].items()}
        if self.reached is None:
            return steps
        done = {phase.name: steps[phase.name] for phase in self.begun}
        return done | ({self.reached['phase']: int(self.reached['step'])} if done else {})

    def _beside(self, record: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
        """The record with what others have added to the run's scores before; see `keep_scores`."""
        try:
            return statistics.keep_scores(record, json.loads(path.read_text(encoding='utf-8')))
        except FileNotFoundError:
            return record
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warn(f'{path} cannot be read ({type(error).__name__}); rows added to it are gone')
            return record

    def _scores(
        self, params: Params, key: PRNGKeyArray, episodes: int, max_steps: int, say: Say
    ) -> dict[str, Any]:
        """Scores of random play, the baselines and each read-out, sampled and greedy."""
        if self.game is None:
            return self.baselines()
        score = functools.partial(self.score, key=key, episodes=episodes, max_steps=max_steps)
        one_seed = {'none': np.zeros(1)}  # random play has no parameters
        random = score(returns.RandomActor(self.agent.spec.actions), one_seed, greedy=False)
        scores: dict[str, Any] = {'random': random.returns[0], **self.baselines()}
        for name, readout in self.readouts.items():
            scores[name] = {}
            for mode, greedy in (('sampled', False), ('greedy', True)):
                played = score(readout.actor, readout.params(params), greedy=greedy)
                scores[name][mode] = played
                # cut by us, not by the game's own time limit
                short = played.truncated & (played.lengths >= max_steps)
                cut = f', {short.mean():.0%} cut at {max_steps} steps' if short.any() else ''
                figure = tables.text(statistics.summary(played.returns))
                say(f'eval  {name:<12} {mode:<8} {figure}{cut}')
        return scores

    # ---------------------------------------------------------------- report

    @abc.abstractmethod
    def draw(self, params: Params, key: PRNGKeyArray) -> dict[str, np.ndarray]:
        """Samples for the report, with one seed's weights."""

    def report(self, folder: pathlib.Path, params: Params) -> pathlib.Path:
        """Draw samples with the first seed's weights and write report.html; return its path."""
        arrays = self.draw(jax.tree.map(lambda x: x[0], params), jax.random.key(self.seed))
        if arrays:
            with open(folder / 'samples.npz', 'wb') as file:
                # NumPy's stub takes them for allow_pickle
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        return write(folder)


def curve(log: Sequence[Mapping[str, Any]], seeds: int) -> dict[str, Any] | None:
    """Returns while training, from the metrics of a run that plays; None if it logged none.

    'of' is 'score' (episodes played to score the agent) where there are such, else 'play' (episodes
    that ended while it learnt).
    """
    scored = any('score/return' in row for row in log)
    name = 'score/return' if scored else 'env/return'
    rows = [row for row in log if row.get(name) is not None]
    if not rows:
        return None
    each = [row.get(f'{name}/seeds') or [row[name]] for row in rows]
    kept = [(r, x) for r, x in zip(rows, each, strict=True) if len(x) == seeds and None not in x]
    return {
        'of': 'score' if scored else 'play',
        'env_frames': [row['env_frames'] for row, _ in kept],
        'seconds': [row['seconds'] for row, _ in kept],
        'return_per_seed': [[x[i] for _, x in kept] for i in range(seeds)],
    }
