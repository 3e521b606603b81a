"""Experiments of agents that learn from a dataset."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import PRNGKeyArray

from reverie.agents.dreamer4 import Dreamer4
from reverie.commands.experiment import samples
from reverie.commands.experiment.base import Experiment, Say
from reverie.data.episodes import Episodes, Part
from reverie.data.labels import Labels
from reverie.data.manifest import MANIFEST
from reverie.data.records import unpack
from reverie.data.source import Dataset
from reverie.data.sources import open_source
from reverie.envs.registry import on_host
from reverie.evaluation import video
from reverie.evaluation.game import AnyGame, game
from reverie.io import warn
from reverie.types import ActionSpace, Component, EnvSpec, Params, UserError

MAX_LOST = 0.01  # share of a dataset's episodes that may be damaged: one bad shard of many
MEASURED_FRAMES = 4096  # frames whose pixels give mean and standard deviation
# Scale of the decoder's first output weights where pixels are standardised; not from the paper.
READOUT_SCALE = 0.1


@dataclasses.dataclass(frozen=True)
class Recorded(Experiment):
    """The agent learns from a dataset, whose environment options are the game's too.

    Training takes nothing but the dataset; its environment is made to score the agent, where that
    can be done. A run that is read back does without the dataset: `known` is its entry `game` of
    config.json.
    """

    data: pathlib.Path = pathlib.Path('datasets')
    labels: Labels = Labels()
    max_lost: float = MAX_LOST
    known: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.has_data and self.known is None:
            raise UserError(f'no dataset at {self.data}; --data says where it is')
        if self.has_data:
            self.episodes.check(self.spec, self.env_name)
            object.__setattr__(self, 'config', standardised(self.config, self.episodes))

    @property
    def has_data(self) -> bool:
        """Whether the dataset is there; a run that was moved may be without."""
        return (self.data / MANIFEST).exists()

    @functools.cached_property
    def episodes(self) -> Episodes:
        return Episodes(self.data, self.max_lost)

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """Options that the game was recorded with."""
        if self.known is not None:
            return dict(self.known.get('options') or {})
        recorded = self.episodes.game_options(self.env_name)
        if recorded is not None:
            return recorded
        shape = self.episodes.spec.obs_shape
        assert isinstance(shape, tuple)
        pictures = on_host(self.env_name) and len(shape) == 3
        return {'size': (shape[0], shape[1])} if pictures else {}

    @functools.cached_property
    def _made(self) -> AnyGame | UserError:
        if self.has_data and 'importer' in self.episodes.provenance:
            return UserError(f'{self.data} holds recordings of no environment')
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
        """The game's, if it can be made, else the dataset's."""
        if self.game is not None:
            return self.game.spec
        return self.episodes.spec if self.known is None else spec_of(self.env_name, self.known)

    @property
    def source(self) -> Dataset:
        if not self.has_data:
            raise UserError(f'no dataset at {self.data}; --data says where it is')
        train = self.episodes.only('train')
        return open_source(train, self.spec, labels=self.labels)

    @property
    def held_out(self) -> Dataset | None:
        """Recordings that nothing is trained on; None without such."""
        if not self.has_data or not self.episodes.held_out:
            return None
        return open_source(self.episodes.only('held_out'), self.spec)

    @property
    def facts(self) -> dict[str, Any]:
        spec = self.spec
        parts = [dataclasses.asdict(part) for part in spec.actions.parts]
        return {
            'data': str(self.data.absolute()),
            'dataset': self.episodes.fingerprint,
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
                'frames': self.episodes.frames,
            },
        }

    @property
    def frames(self) -> int:
        if self.has_data:
            return self.episodes.frames
        return int((self.known or {}).get('frames', 0))

    def baselines(self) -> dict[str, Any]:
        """Returns of the data itself, and of the PPO that made it."""
        if not self.has_data:
            return {}
        found: dict[str, Any] = {}
        kinds = self.episodes.returns()
        fewest = min(map(len, kinds.values()), default=0)
        if fewest:  # as many episodes of each kind, so that short ones do not outweigh the rest
            found['data'] = [r for kind in kinds.values() for r in kind[:fewest]]
        try:
            ppo = (self.episodes.provenance.get('scores') or {}).get('ppo') or {}
            played = {m: np.asarray(x['returns'], float).tolist() for m, x in ppo.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            warn(f'{self.data}: its PPO scores cannot be read ({type(error).__name__}); left out')
            return found
        return found | ({'ppo': played} if played else {})

    def extra(self) -> dict[str, Any]:
        if not self.has_data:
            return {}
        try:
            curve = (self.episodes.provenance.get('ppo') or {}).get('curve') or {}
            frames = int(curve['env_frames'][-1]) if curve else None
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            warn(f'{self.data}: its PPO curve cannot be read ({type(error).__name__}); left out')
            frames = None
        kinds = self.episodes.returns()
        return {
            'dataset': {kind: float(np.mean(r)) for kind, r in kinds.items() if r},
            'ppo_frames': frames,
        }

    def trust(self, params: Params, key: PRNGKeyArray) -> dict[str, Any] | None:
        if not self.has_data or not isinstance(self.agent, Dreamer4):
            return None
        if not self.episodes.schema.packed or self.dreamless:
            return None  # no boolean grid, or no world model yet
        return samples.trust_of(self.agent, params, self.source, key, self.frames)

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
            (folder / 'recordings.png').write_bytes(video.png(pictures))
            say(f'eval  pictures: {folder / "recordings.png"}')
        return found or None

    def draw(self, params: Params, key: PRNGKeyArray) -> dict[str, np.ndarray]:
        if not self.has_data or not isinstance(self.agent, Dreamer4):
            return {}
        return samples.of_dataset(self.agent, params, self.source, key)

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


def standardised(config: Any, episodes: Episodes) -> Any:
    """A configuration whose tokenizer knows mean and standard deviation of a dataset's pixels; the
    same where pixels are no bytes, or the tokenizer knows others.
    """
    tokenizer = getattr(config, 'tokenizer', None)
    pictures = episodes.schema.obs_dtype == 'uint8' and len(episodes.schema.obs_shape) == 3
    if tokenizer is None or not pictures or (tokenizer.pixel_mean, tokenizer.pixel_std) != (0, 1):
        return config
    frames: list[np.ndarray] = []
    for record in episodes.only('train').records():
        frames.append(unpack(record.obs, episodes.schema))
        if sum(map(len, frames)) >= MEASURED_FRAMES:
            break
    pixels = np.concatenate(frames)[:MEASURED_FRAMES] / np.float32(255)
    mean, std = round(float(pixels.mean()), 4), round(float(pixels.std()), 4)
    tokenizer = dataclasses.replace(
        tokenizer, pixel_mean=mean, pixel_std=max(std, 1e-3), readout_scale=READOUT_SCALE
    )
    return dataclasses.replace(config, tokenizer=tokenizer)
