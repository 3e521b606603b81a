"""Presets by name, and the agent of a configuration.

A preset is a function that returns a configuration: print it, change it from the command line,
save it with the weights.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, cast, get_args, overload, runtime_checkable

from reverie import imports
from reverie.agents import limits
from reverie.agents.bc import BC, BCConfig, bc, bc_debug, bc_demo
from reverie.agents.dreamer import Dreamer, DreamerConfig
from reverie.agents.dreamer.presets import (
    dreamer_v3,
    dreamer_v3_debug,
    dreamer_v3_release,
    dreamer_v3_small,
    transdreamer,
    transdreamer_v3,
    transdreamer_v3_small,
)
from reverie.agents.dreamer.presets_v1_v2 import (
    dreamer_v1,
    dreamer_v1_small,
    dreamer_v2,
    dreamer_v2_control,
    dreamer_v2_mixed,
)
from reverie.agents.dreamer4 import Dreamer4, Dreamer4Config
from reverie.agents.dreamer4.presets import (
    dreamer4,
    dreamer4_debug,
    dreamer4_demo,
    dreamer4_image,
    dreamer4_image_gpu,
    dreamer4_paper,
)
from reverie.agents.planet import Planet, PlanetConfig, planet, planet_small
from reverie.types import Agent, EnvSpec, UserError


@runtime_checkable
class MakesAgent(Protocol):
    """Configuration of an agent of the reader's own."""

    def make(self, spec: EnvSpec) -> Agent: ...


Config: TypeAlias = Dreamer4Config | DreamerConfig | PlanetConfig | BCConfig | MakesAgent

PRESETS: dict[str, Callable[..., Config]] = {
    f.__name__: f
    for f in (
        dreamer4, dreamer4_paper, dreamer4_demo, dreamer4_image, dreamer4_image_gpu, dreamer4_debug,
        bc, bc_demo, bc_debug,
        dreamer_v3, dreamer_v3_release, dreamer_v3_small, dreamer_v3_debug,
        transdreamer_v3, transdreamer_v3_small, transdreamer,
        dreamer_v2, dreamer_v2_mixed, dreamer_v2_control, dreamer_v1, dreamer_v1_small,
        planet, planet_small,
    )
}  # fmt: skip


def known(name: str) -> bool:
    """Whether it names a preset: one of PRESETS, or `module:name` of the reader's own."""
    return name in PRESETS or imports.is_own(name)


def get(name: str, size: str | None = None) -> Config:
    """The configuration of a preset, of another size if it has sizes.

    Raises UserError naming what is known.
    """
    if not known(name):
        raise UserError(
            f'preset {name!r} is unknown; expected one of {", ".join(PRESETS)}, or <module>:<name>'
        )
    preset = PRESETS[name] if name in PRESETS else imports.find(name)
    if size is not None and 'size' not in inspect.signature(preset).parameters:
        raise UserError(f'--size {size}: preset {name} has one size only')
    config: Any = imports.call(name, preset, *(() if size is None else (size,)))
    if not (dataclasses.is_dataclass(config) and isinstance(config, get_args(Config))):
        expected = ', '.join(kind.__name__ for kind in get_args(Config)[:-1])
        raise UserError(
            f'preset {name} returned {type(config).__name__}; expected {expected}, or a dataclass '
            'with make(spec) -> Agent'
        )
    return cast(Config, config)


@overload
def make(config: Dreamer4Config, spec: EnvSpec) -> Dreamer4: ...
@overload
def make(config: DreamerConfig, spec: EnvSpec) -> Dreamer: ...
@overload
def make(config: PlanetConfig, spec: EnvSpec) -> Planet: ...
@overload
def make(config: BCConfig, spec: EnvSpec) -> BC: ...
@overload
def make(config: MakesAgent, spec: EnvSpec) -> Agent: ...
def make(config: Config, spec: EnvSpec) -> Agent:
    """The agent of a configuration for an environment. Raises UserError if they do not fit, or for
    a number that makes no agent.
    """
    limits.check(config, named=not isinstance(config, MakesAgent))
    if isinstance(config, MakesAgent):
        agent = config.make(spec)
        if not isinstance(agent, Agent):
            raise UserError(
                f'{type(config).__name__}.make returned {type(agent).__name__}; expected an Agent of '
                'reverie.types'
            )
        return agent
    if isinstance(config, Dreamer4Config):
        return Dreamer4(config, spec)
    if isinstance(config, DreamerConfig):
        return Dreamer(config, spec)
    return Planet(config, spec) if isinstance(config, PlanetConfig) else BC(config, spec)
