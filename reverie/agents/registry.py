"""Presets by name, and the agent of a configuration.

A preset is a function that returns a configuration: print it, change it from the command line,
save it with the weights.
"""

import inspect
from collections.abc import Callable
from typing import TypeAlias, overload

from reverie.agents.bc import BC, BCConfig, bc, bc_debug, bc_demo
from reverie.agents.dreamer import Dreamer, DreamerConfig
from reverie.agents.dreamer.presets import (
    dreamer_v1,
    dreamer_v1_small,
    dreamer_v2,
    dreamer_v2_control,
    dreamer_v2_mixed,
    dreamer_v3,
    dreamer_v3_debug,
    dreamer_v3_release,
    dreamer_v3_small,
    transdreamer,
    transdreamer_v3,
    transdreamer_v3_small,
)
from reverie.agents.dreamer4 import Dreamer4, Dreamer4Config
from reverie.agents.dreamer4.presets import dreamer4, dreamer4_debug, dreamer4_demo, dreamer4_paper
from reverie.agents.planet import Planet, PlanetConfig, planet, planet_small
from reverie.types import EnvSpec, UserError

Config: TypeAlias = Dreamer4Config | DreamerConfig | PlanetConfig | BCConfig

PRESETS: dict[str, Callable[..., Config]] = {
    f.__name__: f
    for f in (
        dreamer4, dreamer4_paper, dreamer4_demo, dreamer4_debug, bc, bc_demo, bc_debug,
        dreamer_v3, dreamer_v3_release, dreamer_v3_small, dreamer_v3_debug,
        transdreamer_v3, transdreamer_v3_small, transdreamer,
        dreamer_v2, dreamer_v2_mixed, dreamer_v2_control, dreamer_v1, dreamer_v1_small,
        planet, planet_small,
    )
}  # fmt: skip


def get(name: str, size: str | None = None) -> Config:
    """The configuration of a preset, of another size if it has sizes.

    Raises UserError naming what is known.
    """
    if name not in PRESETS:
        raise UserError(f'preset {name!r} is unknown; expected one of {", ".join(PRESETS)}')
    if size is None:
        return PRESETS[name]()
    if 'size' not in inspect.signature(PRESETS[name]).parameters:
        raise UserError(f'--size {size}: preset {name} has one size only')
    return PRESETS[name](size)


@overload
def make(config: Dreamer4Config, spec: EnvSpec) -> Dreamer4: ...
@overload
def make(config: DreamerConfig, spec: EnvSpec) -> Dreamer: ...
@overload
def make(config: PlanetConfig, spec: EnvSpec) -> Planet: ...
@overload
def make(config: BCConfig, spec: EnvSpec) -> BC: ...
def make(config: Config, spec: EnvSpec) -> Dreamer4 | Dreamer | Planet | BC:
    """The agent of a configuration for an environment. Raises UserError if they do not fit."""
    if isinstance(config, Dreamer4Config):
        return Dreamer4(config, spec)
    if isinstance(config, DreamerConfig):
        return Dreamer(config, spec)
    return Planet(config, spec) if isinstance(config, PlanetConfig) else BC(config, spec)
