"""Experiments of agents that learn from a dataset."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import PRNGKeyArray

from reverie.agents import registry
from reverie.agents.dreamer4 import Dreamer4
from reverie.commands.experiment import samples
from reverie.commands.experiment.base import Experiment, Say
from reverie.commands.experiment.tasks import Task, file_of, number_of, recorded_options, tasks_of
from reverie.data.episodes import Episodes, Part
from reverie.data.labels import ALL, Labels
from reverie.data.manifest import MANIFEST
from reverie.data.mixture import acted, check_alike, fingerprint, shares
from reverie.data.opening import BUDGET_BYTES, open_mixture, open_source
from reverie.data.records import unpack
from reverie.data.source import Dataset
from reverie.evaluation import video
from reverie.evaluation.game import AnyGame, DeviceGame, game
from reverie.evaluation.trust import ceiling
from reverie.io import warn
from reverie.types import ActionSpace, Agent, Component, EnvSpec, MultiTask, Params, UserError

MAX_LOST = 0.01  # share of a dataset's episodes that may be damaged: one bad shard of many
MEASURED_FRAMES = 4096  # frames whose pixels give mean and standard deviation
# Scale of the decoder's first output weights where pixels are standardised; not from the paper.
READOUT_SCALE = 0.1


@dataclasses.dataclass(frozen=True)
class Recorded(Experiment):
    """The agent learns from datasets, whose environment options are the game's too.

    Training takes nothing but the datasets; their environment is made to score the agent, where
    that can be done. A run that is read back does without them: `known` is its entry `game` of
    config.json, with its `tasks`. Where they are of several tasks, `task` is the one that the agent
    is told, and scores, baselines and samples are those of its datasets.
    """

    data: tuple[pathlib.Path, ...] = (pathlib.Path('datasets'),)
    labels: Labels = Labels()
    max_lost: float = MAX_LOST
    known: Mapping[str, Any] | None = None
    weights: tuple[float, ...] = ()  # of the datasets; equal if not given
    memory_bytes: int = BUDGET_BYTES  # that all datasets may take on the device
    task: int = 0  # number of the task that the agent is told

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.known is None:
            self._check_data()
        if self.has_data:
            shares(self.weights, len(self.data))
            self.episodes.check(self.spec, self.env_name)
            object.__setattr__(self, 'config', standardised(self.config, self.datasets))

    def _check_data(self) -> None:
        for path in self.data:
            if not (path / MANIFEST).exists():
                raise UserError(f'no dataset at {path}; --data says where it is')

    @property
    def has_data(self) -> bool:
        """Whether the datasets are there; a run that was moved may be without."""
        return all((path / MANIFEST).exists() for path in self.data)

    @functools.cached_property
    def datasets(self) -> tuple[Episodes, ...]:
        return tuple(Episodes(path, self.max_lost) for path in self.data)

    @functools.cached_property
    def own(self) -> list[Episodes]:
        """The datasets of the task that the agent is told."""
        check_alike(self.datasets)
        found = acted(self.datasets)
        if self.task_name is None:
            return found
        found = [episodes for episodes in found if episodes.task == self.task_name]
        if not found:
            said = ' '.join(map(str, self.data))
            raise UserError(f'{said}: expected a dataset of the task {self.task_name}')
        return found

    @property
    def episodes(self) -> Episodes:
        """The first dataset of the task that the agent is told."""
        return self.own[0]

    @functools.cached_property
    def tasks(self) -> tuple[Task, ...]:
        """All tasks of the datasets, one at least."""
        if self.known is not None and 'tasks' in self.known:
            return tuple(Task(**task) for task in self.known['tasks'])
        if self.has_data:
            return tasks_of(self.datasets)
        return (Task(self.env_name, self.env_name, self.options),)

    @property
    def task_name(self) -> str | None:
        return self.tasks[self.task].name if len(self.tasks) > 1 else None

    def told(self, task: str | None = None) -> tuple[Experiment, ...]:
        numbers = range(len(self.tasks)) if task is None else [number_of(task, self.tasks)]
        return tuple(self._told(number) for number in numbers)

    def _told(self, number: int) -> 'Recorded':
        if number == self.task:
            return self
        told = self.tasks[number]
        known = self.known and {**self.known, 'options': told.options}
        return dataclasses.replace(self, task=number, env_name=told.env, known=known)

    def file_of(self, path: pathlib.Path) -> pathlib.Path:
        return file_of(path, self.tasks, self.task)

    @functools.cached_property
    def agent(self) -> Agent:
        agent: Agent = registry.make(self.config, self.spec)
        if not self.spec.tasks:
            return agent
        if not isinstance(agent, MultiTask):
            raise UserError(
                f'{self.preset} learns one task, but the datasets are of {", ".join(self.spec.tasks)}'
            )
        return agent.with_task(self.task)

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """Options that the game was recorded with."""
        if self.known is not None:
            return dict(self.known.get('options') or {})
        return recorded_options(self.episodes, self.env_name)

    @functools.cached_property
    def _made(self) -> AnyGame | UserError:
        if self.has_data and 'importer' in self.episodes.provenance:
            return UserError(f'{self.episodes.path} holds recordings of no environment')
        found = game(self.env_name, self.options)
        try:
            found.spec  # noqa: B018, which makes the environment
        except UserError as error:
            return error
        return found

    @property
    def game(self) -> AnyGame | None:
        return None if isinstance(self._made, UserError) else self._made

    @property
    def unscored(self) -> str | None:
        return str(self._made) if isinstance(self._made, UserError) else None

    @functools.cached_property
    def spec(self) -> EnvSpec:
        """The game's, if it can be made, else the dataset's; with the names of the tasks."""
        if self.game is not None:
            found = self.game.spec
        else:
            found = self.episodes.spec if self.known is None else spec_of(self.env_name, self.known)
        names = tuple(task.name for task in self.tasks)
        return dataclasses.replace(found, tasks=names if len(names) > 1 else ())

    def train(self, folder: pathlib.Path, **options: Any) -> Params:
        self.told()  # refuses a task whose game does not fit
        return super().train(folder, **options)

    @property
    def source(self) -> Dataset:
        return self._open('train', lambda _: True, self.labels)

    @property
    def held_out(self) -> Dataset | None:
        """Recordings that nothing is trained on; None without such."""
        if not self.has_data or not any(episodes.held_out for episodes in self.datasets):
            return None
        return self._open('held_out', lambda episodes: bool(episodes.held_out))

    @property
    def own_source(self) -> Dataset:
        """Source of the task that the agent is told."""
        return self._open('train', lambda episodes: episodes in self.own, self.labels)

    def _open(
        self, part: Part, wanted: Callable[[Episodes], bool], labels: Labels = ALL
    ) -> Dataset:
        """Open a part of those datasets that are wanted."""
        self._check_data()
        if len(self.datasets) == 1:
            only = self.episodes.only(part)
            return open_source(only, self.spec, self.memory_bytes, labels=labels)
        weights = shares(self.weights, len(self.datasets)).tolist()
        found = [
            (e.only(part), w) for e, w in zip(self.datasets, weights, strict=True) if wanted(e)
        ]
        datasets, weights = zip(*found, strict=True)
        return open_mixture(datasets, self.spec, weights, self.memory_bytes, labels)

    @property
    def facts(self) -> dict[str, Any]:
        spec = self.spec
        parts = [dataclasses.asdict(part) for part in spec.actions.parts]
        paths = [str(path.absolute()) for path in self.data]
        several: dict[str, Any] = {}
        if len(paths) > 1:
            several['weights'] = list(self.weights or [1.0] * len(paths))
        if len(self.tasks) > 1:
            several['tasks'] = [task._asdict() for task in self.tasks]
        return {
            'data': paths if len(paths) > 1 else paths[0],
            'dataset': fingerprint(self.datasets),
            **several,
            'label_fraction': self.labels.fraction,
            **({'label_stretch': self.labels.stretch} if self.labels.stretch else {}),
            **({'labelled_files': list(self.labels.files)} if self.labels.files else {}),
            'max_lost': self.max_lost,
            'game': {
                'options': self.options,
                'obs_shape': spec.obs_shape,
                'actions': {'kind': spec.actions.kind, 'size': spec.actions.size}
                | ({'parts': parts} if parts else {}),
                'max_return': spec.max_return,
                'frames': self.frames,
            },
        }

    @property
    def frames(self) -> int:
        if self.has_data:
            return sum(episodes.frames for episodes in self.datasets)
        return int((self.known or {}).get('frames', 0))

    def baselines(self) -> dict[str, Any]:
        """Returns of the data itself, and of the PPO that made it."""
        if not self.has_data:
            return {}
        found: dict[str, Any] = {}
        kinds = self._returns()
        fewest = min(map(len, kinds.values()), default=0)
        if fewest:  # as many episodes of each kind, so that short ones do not outweigh the rest
            found['data'] = [r for kind in kinds.values() for r in kind[:fewest]]
        try:
            ppo = (self.episodes.provenance.get('scores') or {}).get('ppo') or {}
            played = {m: np.asarray(x['returns'], float).tolist() for m, x in ppo.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            warn(
                f'{self.episodes.path}: its PPO scores cannot be read ({type(error).__name__}); left out'
            )
            return found
        return found | ({'ppo': played} if played else {})

    def _returns(self) -> dict[str, list[float]]:
        """Returns of the complete episodes of each kind."""
        found: dict[str, list[float]] = {}
        for episodes in self.own:
            for kind, returns in episodes.returns().items():
                found[kind] = found.get(kind, []) + returns
        return found

    def extra(self) -> dict[str, Any]:
        told = {} if self.task_name is None else {'task': self.task_name}
        if not self.has_data:
            return told
        try:
            curve = (self.episodes.provenance.get('ppo') or {}).get('curve') or {}
            frames = int(curve['env_frames'][-1]) if curve else None
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            warn(
                f'{self.episodes.path}: its PPO curve cannot be read ({type(error).__name__}); left out'
            )
            frames = None
        kinds = self._returns()
        return told | {
            'dataset': {kind: float(np.mean(r)) for kind, r in kinds.items() if r},
            'ppo_frames': frames,
        }

    def trust(self, params: Params, key: PRNGKeyArray) -> dict[str, Any] | None:
        if not self.has_data or not isinstance(self.agent, Dreamer4):
            return None
        if not self.episodes.schema.packed or self.dreamless:
            return None  # no boolean grid, or no world model yet
        frames = sum(episodes.frames for episodes in self.own)
        found = samples.trust_of(self.agent, params, self.own_source, key, frames)
        kept = 'snapshots' in (self.episodes.provenance.get('ppo') or {})
        if not isinstance(self.game, DeviceGame) or not kept:
            return found
        env, path = self.game.env, self.episodes.path
        players = samples.players_of(env, path, self.episodes.provenance)
        for channel, cells in zip(found['channels'], ceiling(env, players, key), strict=True):
            channel['ceiling'] = cells
        if self.agent.has_policy:
            ranked = samples.ranking_of(self.agent, self.readouts, params, env, path, key)
            found['ranking'] = ranked
        return found

    @property
    def has_recordings(self) -> bool:
        """Pictures, or grids of which some are held out."""
        if not self.has_data:
            return False
        schema = self.episodes.schema
        return schema.obs_dtype == 'uint8' or (schema.packed and bool(self.episodes.held_out))

    def recordings(
        self, folder: pathlib.Path, params: Params, key: PRNGKeyArray, say: Say
    ) -> list[dict[str, Any]] | None:
        """Compare dreams with recordings that are held out, with all where none are; leave pictures
        of the first seed's in `recordings.png`.
        """
        if not self.has_recordings or not isinstance(self.agent, Dreamer4) or self.dreamless:
            return None
        part: Part = 'held_out' if self.episodes.held_out else 'all'
        found, pictures = samples.recordings_of(
            self.agent, params, self.episodes.only(part), key, say
        )
        if found:
            file = self.file_of(folder / 'recordings.png')
            file.write_bytes(video.png(pictures))
            say(f'eval  pictures: {file}')
        return found or None

    def draw(self, params: Params, key: PRNGKeyArray) -> dict[str, np.ndarray]:
        if not self.has_data or not isinstance(self.agent, Dreamer4):
            return {}
        return samples.of_dataset(self.agent, params, self.own_source, key)

    @property
    def dreamless(self) -> bool:
        """Whether the run was stopped before its dynamics learnt anything."""
        return self.reached is not None and not any(
            'dynamics' in phase.trains for phase in self.begun
        )


def spec_of(env_name: str, known: Mapping[str, Any]) -> EnvSpec:
    """The environment that the entry `game` of config.json describes."""
    try:
        parts = tuple(
            Component(
                **part
                | {'choices': tuple(part['choices']), 'keys': tuple(map(tuple, part['keys']))}
            )
            for part in known['actions'].get('parts', ())
        )
        actions = ActionSpace(known['actions']['kind'], int(known['actions']['size']), (), parts)
        return EnvSpec(env_name, tuple(known['obs_shape']), actions, known.get('max_return'))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'config.json: game {known!r:.80} describes no environment') from error


def standardised(config: Any, datasets: Sequence[Episodes]) -> Any:
    """A configuration whose tokenizer knows mean and standard deviation of the datasets' pixels, of
    as many frames of each; the same where pixels are no bytes, or the tokenizer knows others.
    """
    tokenizer = getattr(config, 'tokenizer', None)
    schema = datasets[0].schema
    pictures = schema.obs_dtype == 'uint8' and len(schema.obs_shape) == 3
    if tokenizer is None or not pictures or (tokenizer.pixel_mean, tokenizer.pixel_std) != (0, 1):
        return config
    most = MEASURED_FRAMES // len(datasets)
    pixels = np.concatenate([_first_frames(e, most) for e in datasets]) / np.float32(255)
    mean, std = round(float(pixels.mean()), 4), round(float(pixels.std()), 4)
    tokenizer = dataclasses.replace(
        tokenizer, pixel_mean=mean, pixel_std=max(std, 1e-3), readout_scale=READOUT_SCALE
    )
    return dataclasses.replace(config, tokenizer=tokenizer)


def _first_frames(episodes: Episodes, most: int) -> np.ndarray:
    """The first frames to train on."""
    frames: list[np.ndarray] = []
    for record in episodes.only('train').records():
        frames.append(unpack(record.obs, episodes.schema))
        if sum(map(len, frames)) >= most:
            break
    return np.concatenate(frames)[:most]
