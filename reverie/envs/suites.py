"""Adapters of optional packages to the Gymnasium interface, by name; never imports JAX.

| name                | package    | observations                        | customary                                 |
|---------------------|------------|-------------------------------------|-------------------------------------------|
| atari/<game>        | ale-py     | RGB frames                          | 4 frames per action, sticky 0.25, 108,000 |
| dmc/<domain>_<task> | dm_control | state (sorted keys), or RGB frames  | 2 control steps per action, 1,000         |
| crafter/reward      | crafter    | RGB frames                          | 10,000 steps                              |
| gym/<Id>            | gymnasium  | what it has, or rendered RGB frames | what it has                               |
"""

import difflib
import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from reverie.envs import registry, spaces
from reverie.envs.observations import IMAGE_SIZE, EnvRefusedError, Wishes
from reverie.envs.options import typed
from reverie.errors import UserError

# Options of every environment on the host. obs also takes codes:<n>, keys parts with commas.
OPTIONS = dict(
    action_repeat=int | None,
    size=tuple[int, int] | None,
    time_limit=int | None,
    obs=str | None,
    keys=str | None,
)

CUSTOMARY = Wishes(size=IMAGE_SIZE)


class Built(NamedTuple):
    """Gymnasium environment and the settings customary with it."""

    env: Any
    action_repeat: int = 1
    time_limit: int | None = None  # in the environment's own steps
    pool: bool = False  # show the maximum of the last two frames of a repeated action
    meanings: tuple[str, ...] = ()


def build(
    name: str, wishes: Wishes = CUSTOMARY, arguments: Mapping[str, Any] = MappingProxyType({})
) -> Built:
    """Build the environment called `name`; `wishes` matter to suites that render themselves,
    `arguments` are those of the environment's own class.

    Raises EnvRefusedError for an unknown name or argument, and for a missing package with the
    command that installs it.
    """
    family, _, task = name.partition('/')
    return BUILDERS[family](name, task, wishes, arguments)


def _need(name: str, package: str, extra: str) -> Any:
    """Import a package. Raises EnvRefusedError if it is missing."""
    try:
        return __import__(package)
    except ImportError as error:
        hint = f"pip install 'reverie[{extra}]'"
        raise EnvRefusedError(
            f'{name} needs the package {package}, which is missing; install it with: {hint}'
        ) from error


def _choose(name: str, task: str, known: list[str]) -> str:
    """Check that a task is known. Raises EnvRefusedError, which names tasks like it."""
    if task not in known:
        near = difflib.get_close_matches(task, known, 5, 0.4) or sorted(known)[:5]
        raise EnvRefusedError(
            f'{name!r} is unknown; near it are {", ".join(near)} (of {len(known)})'
        )
    return task


def _atari(name: str, task: str, wishes: Wishes, arguments: Mapping[str, Any]) -> Built:
    """Atari as in Machado et al. 2018: sticky actions 0.25, all 18 actions, no life signals, 30
    minutes of play.
    """
    _need(name, 'gymnasium', 'atari')
    _need(name, 'ale_py', 'atari')
    from ale_py import env, roms

    if wishes.obs == 'state':
        raise EnvRefusedError(f"{name} was asked for obs='state'; expected 'image'")
    game = _choose(name, task, list(roms.get_all_rom_ids()))
    kinds = dict(repeat_action_probability=float, full_action_space=bool, mode=int, difficulty=int)
    settings = dict(repeat_action_probability=0.25, full_action_space=True)
    play = env.AtariEnv(game, frameskip=1, **settings | _typed(name, arguments, kinds))
    meanings = tuple(meaning.lower() for meaning in play.get_action_meanings())
    return Built(play, action_repeat=4, time_limit=108_000, pool=True, meanings=meanings)


def _crafter(name: str, task: str, wishes: Wishes, arguments: Mapping[str, Any]) -> Built:
    _need(name, 'gymnasium', 'crafter')
    _need(name, 'crafter', 'crafter')
    import crafter
    import gymnasium
    from crafter.objects import Object

    _choose(name, task, ['reward', 'noreward'])
    _typed(name, arguments, {})
    if wishes.obs == 'state':
        raise EnvRefusedError(f"{name} was asked for obs='state'; expected 'image'")

    # Crafter draws creatures from sets, whose order is that of memory addresses: one seed, many
    # games. Their place in the list of objects serves as well.
    def place(thing: Any) -> Any:
        return thing.__dict__.setdefault('order_of_birth', len(thing.world._objects))

    Object.__hash__ = place
    frame = wishes.size or IMAGE_SIZE

    class Crafter(gymnasium.Env):
        game: Any = None

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[np.ndarray, dict[str, Any]]:
            if seed is not None or self.game is None:
                self.game = crafter.Env(size=frame[::-1], reward=task == 'reward', seed=seed)
            return self.game.reset(), {}

        def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            obs, reward, done, info = self.game.step(action)
            dead = info['discount'] == 0
            return obs, reward, dead, done and not dead, {}

    env, meanings = Crafter(), tuple(crafter.constants.actions)
    env.observation_space = gymnasium.spaces.Box(0, 255, (*frame, 3), np.uint8)
    env.action_space = gymnasium.spaces.Discrete(len(meanings))
    return Built(env, meanings=meanings)


def _dmc(name: str, task: str, wishes: Wishes, arguments: Mapping[str, Any]) -> Built:
    _need(name, 'gymnasium', 'dmc')
    if wishes.obs == 'image' and 'DISPLAY' not in os.environ:
        # dm_control would choose GLFW, which needs a display
        os.environ.setdefault('MUJOCO_GL', 'egl')
    _need(name, 'dm_control', 'dmc')
    import gymnasium
    from dm_control import suite

    known = {f'{domain}_{what}': (domain, what) for domain, what in suite.ALL_TASKS}
    task = task.replace('cup_', 'ball_in_cup_') if task.startswith('cup_') else task
    pair = known[_choose(name, task, list(known))]
    _typed(name, arguments, {})
    inner, frame = suite.load(*pair), wishes.size or IMAGE_SIZE
    camera = 2 if pair[0] == 'quadruped' else 0  # the one that follows the body, as in Dreamer

    class DMControl(gymnasium.Env):
        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[np.ndarray, dict[str, Any]]:
            if seed is not None:
                inner.task.random.seed(seed)
            return self.observe(inner.reset()), {}

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            arrived = inner.step(action)
            terminal = arrived.last() and arrived.discount == 0.0
            truncated = arrived.last() and not terminal
            return self.observe(arrived), arrived.reward or 0.0, terminal, truncated, {}

        def observe(self, arrived: Any) -> np.ndarray:
            if wishes.obs == 'image':
                image: np.ndarray = inner.physics.render(*frame, camera_id=camera)
                return image
            parts = [np.ravel(arrived.observation[key]) for key in sorted(arrived.observation)]
            return np.concatenate(parts).astype(np.float32)

        def close(self) -> None:
            inner.close()

    env, bounds = DMControl(), inner.action_spec()
    if wishes.obs == 'image':
        env.observation_space = gymnasium.spaces.Box(0, 255, (*frame, 3), np.uint8)
    else:
        width = sum(int(np.prod(part.shape)) for part in inner.observation_spec().values())
        env.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (width,), np.float32)
    low, high = bounds.minimum.astype(np.float32), bounds.maximum.astype(np.float32)
    env.action_space = gymnasium.spaces.Box(low, high, bounds.shape, np.float32)
    return Built(env, action_repeat=2)


def _gym(name: str, task: str, wishes: Wishes, arguments: Mapping[str, Any]) -> Built:
    gymnasium = _need(name, 'gymnasium', 'gymnasium')
    from gymnasium.envs import registration

    module, colon, registered = task.partition(':')
    try:
        if colon:
            importlib.import_module(module)
        known = gymnasium.spec(registered if colon else task)
        creator = known.entry_point
        if isinstance(creator, str):
            creator = registration.load_env_creator(creator)
        arguments = _arguments(name, arguments, creator, known.kwargs)
        env = gymnasium.make(task, disable_env_checker=True, **arguments)
        if (
            wishes.obs == 'image'
            and spaces.view(env.observation_space, Wishes('image'), name) is None
        ):
            env.close()
            arguments = {'render_mode': 'rgb_array', **arguments}
            env = gymnasium.make(task, disable_env_checker=True, **arguments)
    except (gymnasium.error.Error, ImportError) as error:
        said = ' '.join(str(error).split())
        raise EnvRefusedError(f'{name} cannot be made: {said}{_instead(task)}') from error
    return Built(env)


def _arguments(
    name: str, given: Mapping[str, Any], creator: Callable[..., Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of an environment's own class, each of the type of its default value."""
    parameters = inspect.signature(creator).parameters
    declared: dict[str, Any] = {}
    for parameter in parameters.values():
        default = defaults.get(parameter.name, parameter.default)
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            simple = isinstance(default, bool | int | float | str)
            declared[parameter.name] = type(default) if simple else Any
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        declared = dict.fromkeys(given, Any) | declared
    return _typed(name, given, declared)


def _typed(name: str, given: Mapping[str, Any], declared: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the declared types. Raises EnvRefusedError naming one that is not."""
    try:
        return typed(name, given, {**dict.fromkeys(OPTIONS, Any), **declared})
    except UserError as error:
        raise EnvRefusedError(str(error)) from error


def _instead(task: str) -> str:
    """The way to write an id that Gymnasium does not have, if one is known."""
    inner = task.rpartition(':')[2]
    for prefix, module in registry.MODULES.items():
        if ':' not in task and inner.startswith((f'{prefix}/', f'{prefix}-')):
            atari = f' or atari/{registry.snake(inner)}' if prefix == 'ALE' else ''
            return f'; expected gym/{module}:{inner}{atari}'
    import gymnasium

    found = registry.nearest(inner, list(gymnasium.registry))
    meant = ' or '.join(f'gym/{known}' for known in found[:3])
    return f'; did you mean {meant}?' if found else ''


BUILDERS = dict(zip(registry.ON_HOST, (_atari, _dmc, _crafter, _gym), strict=True))


def camera(env: Any, name: str) -> Any:
    """Wrap an environment to observe its renderer. Raises EnvRefusedError if it has none."""
    from gymnasium.wrappers import AddRenderObservation

    if env.render_mode != 'rgb_array':
        raise EnvRefusedError(
            f"{name} has no images and render_mode={env.render_mode!r}; expected 'rgb_array'"
        )
    env.reset()  # renderers draw a state, and the wrapper renders at once
    return AddRenderObservation(env, render_only=True)
