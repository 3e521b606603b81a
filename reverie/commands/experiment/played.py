"""Experiments of agents that learn from what they play."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from reverie import imports
from reverie.agents import registry
from reverie.agents.dreamer import Dreamer
from reverie.agents.planet import Planet
from reverie.commands.experiment import samples
from reverie.commands.experiment.base import Experiment
from reverie.data.source import Source
from reverie.envs.registry import on_host
from reverie.evaluation.game import AnyGame, DeviceGame, HostGame, game
from reverie.training.loop import Scoring
from reverie.training.online import CollectConfig, Online
from reverie.training.online_host import OnlineHost
from reverie.types import EnvSpec, Params, UserError

SCORE_SEED = 500  # of the episodes played while training; the final scores have seeds of their own


@dataclasses.dataclass(frozen=True)
class Played(Experiment):
    """The agent learns from what it plays, in environments on the device."""

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the environment
    env_frames: int = 100_000  # played, prefill included; sets the number of updates
    export: pathlib.Path | None = None  # dataset to leave the replay as
    score_every: int = 0  # frames between two scores while training; 0 for none
    score_episodes: int = 32  # sampled episodes of such a score
    score_steps: int = 5000  # steps after which such an episode is cut

    @functools.cached_property
    def game(self) -> AnyGame:
        return game(self.env_name, self.options)

    @property
    def spec(self) -> EnvSpec:
        return self.game.spec

    def train(self, folder: pathlib.Path, **options: Any) -> Params:
        if isinstance(self.game, DeviceGame) and imports.is_own(self.env_name):
            self.game.check()  # ours are tested, and gymnax's declare their bounds
        return super().train(folder, **options)

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

    def _frames_after(self, updates: int) -> int:
        """Environment frames that one seed has played after so many updates."""
        r = self.config.replay
        return self.play.env_frames(updates, r.batch, r.length)

    @functools.cached_property
    def agent(self) -> Dreamer | Planet:
        """The agent, with as many updates as the frames allow; raises UserError if that is none."""
        registry.make(self.config, self.spec)  # whether both fit comes before how much is played
        prefill, first = self._frames_after(0), self._frames_after(1)
        updates = (self.env_frames - prefill) // (first - prefill)
        if updates < 1:
            raise UserError(
                f'--frames {self.env_frames}: expected at least {first}, the prefill and one update'
            )
        config = dataclasses.replace(self.config, steps=updates)
        agent: Dreamer | Planet = registry.make(config, self.spec)
        return agent

    @property
    def source(self) -> Source:
        assert isinstance(self.game, DeviceGame)
        return Online(self.game.env, self.agent.explorer, self.play, self.export, self.provenance)

    @property
    def scoring(self) -> Scoring | None:
        """Sampled episodes of the first read-out, always begun with the same keys."""
        if not self.score_every:
            return None
        readout = next(iter(self.agent.readouts.values()))

        def play(params: Params) -> dict[str, np.ndarray]:
            played = self.score(
                readout.actor,
                readout.params(params),
                jax.random.key(SCORE_SEED),
                episodes=self.score_episodes,
                max_steps=self.score_steps,
                greedy=False,
            )
            return {'score/return': played.returns.mean(1), 'score/length': played.lengths.mean(1)}

        return Scoring(self.score_every, play)

    @property
    def provenance(self) -> dict[str, Any]:
        """Provenance in the manifest of the exported replay."""
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
        if self.reached is not None:
            return int(self.reached['env_frames'])
        return self._frames_after(self.agent.phases[0].steps)

    def draw(self, params: Params, key: PRNGKeyArray) -> dict[str, np.ndarray]:
        assert isinstance(self.game, DeviceGame)
        return samples.of_play(self.agent, params, self.game.env, key)


@dataclasses.dataclass(frozen=True)
class Hosted(Played):
    """The environments are Gymnasium's, in processes of their own."""

    @property
    def host(self) -> HostGame:
        assert isinstance(self.game, HostGame)
        return self.game

    @property
    def source(self) -> OnlineHost:
        seeds = range(self.seed, self.seed + self.seeds)
        vectors = [self.host.vector(self.play.envs, 'train', seed) for seed in seeds]
        return OnlineHost(
            vectors,
            self.agent.explorer,
            self.play,
            self.seed,
            dataset=self.export,
            facts=self.provenance,
        )

    def draw(self, params: Params, key: PRNGKeyArray) -> dict[str, np.ndarray]:
        with self.host.vector(4, 'report', self.seed) as vector:
            return samples.of_host(self.agent, params, vector, key)


def played(env_name: str) -> type[Played]:
    """The kind of experiment for an agent that plays this environment."""
    return Hosted if on_host(env_name) else Played
