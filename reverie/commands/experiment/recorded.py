"""Experiments of agents that learn from a dataset."""

import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np
from jaxtyping import PRNGKeyArray

from reverie.agents.dreamer4 import Dreamer4
from reverie.commands.experiment import samples
from reverie.commands.experiment.base import Experiment
from reverie.data.episodes import Episodes
from reverie.data.source import Dataset
from reverie.data.sources import open_source
from reverie.envs import device
from reverie.types import Env, Params

MAX_LOST = 0.01  # share of a dataset's episodes that may be damaged: one bad shard of many


@dataclasses.dataclass(frozen=True)
class Recorded(Experiment):
    """The agent learns from a dataset, whose environment options are the game's too."""

    data: pathlib.Path = pathlib.Path('datasets')
    label_fraction: float = 1.0  # share of the episodes whose actions are used
    max_lost: float = MAX_LOST

    def __post_init__(self) -> None:
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
    def source(self) -> Dataset:
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
        """Returns of the data itself, and of the PPO that made it."""
        found: dict[str, Any] = {}
        known = self.episodes.provenance.get('scores') or {}
        kinds = self.episodes.returns()
        fewest = min(map(len, kinds.values()))
        if fewest:  # as many episodes of each kind, so that short ones do not outweigh the rest
            found['data'] = [r for kind in kinds.values() for r in kind[:fewest]]
        if 'ppo' in known:
            found['ppo'] = {mode: played['returns'] for mode, played in known['ppo'].items()}
        return found

    def extra(self) -> dict[str, Any]:
        curve = (self.episodes.provenance.get('ppo') or {}).get('curve') or {}
        kinds = self.episodes.returns()
        return {
            'dataset': {kind: float(np.mean(r)) for kind, r in kinds.items() if r},
            'ppo_frames': int(curve['env_frames'][-1]) if curve else None,
        }

    def trust(self, params: Params, key: PRNGKeyArray) -> dict[str, Any] | None:
        if not isinstance(self.agent, Dreamer4) or not self.episodes.schema.packed:
            return None  # without a world model, or not a boolean grid
        return samples.trust_of(self.agent, params, self.source, key, self.frames)

    def draw(self, params: Params, key: PRNGKeyArray) -> dict[str, np.ndarray]:
        if not isinstance(self.agent, Dreamer4):
            return {}
        return samples.of_dataset(self.agent, params, self.source, key)
