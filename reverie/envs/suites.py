"""Adapters of optional packages to the Gymnasium interface, by name; never imports JAX.

| name                | package    | observations                        | customary                                 |
|---------------------|------------|-------------------------------------|-------------------------------------------|
| atari/<game>        | ale-py     | RGB frames                          | 4 frames per action, sticky 0.25, 108,000 |
| dmc/<domain>_<task> | dm_control | state (sorted keys), or RGB frames  | 2 control steps per action, 1,000         |
| crafter/reward      | crafter    | RGB frames                          | 10,000 steps                              |
| gym/<Id>            | gymnasium  | what it has, or rendered RGB frames | what it has                               |
"""

import difflib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

FAMILIES = ('atari', 'dmc', 'crafter', 'gym')
IMAGE_SIZE = (64, 64)
SMALLEST_IMAGE = 32  # a Box [h, w, c] below it is a grid of symbols, never resized
LONGEST_STATE = 1 << 16  # numbers in a vector


class EnvRefusedError(ValueError):
    """Mistake of the user's, found in a worker process; the parent raises it as UserError."""


class Built(NamedTuple):
    """Gymnasium environment and the settings customary with it."""

    env: Any
    action_repeat: int = 1
    time_limit: int | None = None  # in the environment's own steps
    pool: bool = False  # show the maximum of the last two frames of a repeated action
    meanings: tuple[str, ...] = ()


class ObsView(NamedTuple):
    """Conversion of an observation into one array."""

    shape: tuple[int, ...]
    dtype: type
    see: Callable[[Any], np.ndarray]


def build(name: str, obs: str | None = None, size: tuple[int, ...] | None = IMAGE_SIZE) -> Built:
    """Build the environment called `name`; `obs` and `size` matter to suites that render
    themselves.

    Raises EnvRefusedError for an unknown name, and for a missing package with the command that
    installs it.
    """
    family, _, task = name.partition('/')
    builders = dict(zip(FAMILIES, (_atari, _dmc, _crafter, _gym), strict=True))
    if family not in builders or not task:
        raise EnvRefusedError(
            f'environment {name!r} is unknown; expected atari/<game>, dmc/<domain>_<task>, crafter/reward or gym/<Id>'
        )
    return builders[family](name, task, obs, size)


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


def _atari(name: str, task: str, obs: str | None, size: tuple[int, ...] | None) -> Built:
    """Atari as in Machado et al. 2018: sticky actions 0.25, all 18 actions, no life signals, 30
    minutes of play.
    """
    _need(name, 'gymnasium', 'atari')
    _need(name, 'ale_py', 'atari')
    from ale_py import env, roms

    if obs == 'state':
        raise EnvRefusedError(f"{name} was asked for obs='state'; expected 'image'")
    game = _choose(name, task, list(roms.get_all_rom_ids()))
    play = env.AtariEnv(game, frameskip=1, repeat_action_probability=0.25, full_action_space=True)
    meanings = tuple(meaning.lower() for meaning in play.get_action_meanings())
    return Built(play, action_repeat=4, time_limit=108_000, pool=True, meanings=meanings)


def _crafter(name: str, task: str, obs: str | None, size: tuple[int, ...] | None) -> Built:
    _need(name, 'gymnasium', 'crafter')
    _need(name, 'crafter', 'crafter')
    import crafter
    import gymnasium
    from crafter.objects import Object

    _choose(name, task, ['reward', 'noreward'])
    if obs == 'state':
        raise EnvRefusedError(f"{name} was asked for obs='state'; expected 'image'")

    # Crafter draws creatures from sets, whose order is that of memory addresses: one seed, many
    # games. Their place in the list of objects serves as well.
    def place(thing: Any) -> Any:
        return thing.__dict__.setdefault('order_of_birth', len(thing.world._objects))

    Object.__hash__ = place
    frame = size or IMAGE_SIZE

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


def _dmc(name: str, task: str, obs: str | None, size: tuple[int, ...] | None) -> Built:
    _need(name, 'gymnasium', 'dmc')
    if obs == 'image' and 'DISPLAY' not in os.environ:
        # dm_control would choose GLFW, which needs a display
        os.environ.setdefault('MUJOCO_GL', 'egl')
    _need(name, 'dm_control', 'dmc')
    import gymnasium
    from dm_control import suite

    known = {f'{domain}_{what}': (domain, what) for domain, what in suite.ALL_TASKS}
    task = task.replace('cup_', 'ball_in_cup_') if task.startswith('cup_') else task
    pair = known[_choose(name, task, list(known))]
    inner, frame = suite.load(*pair), size or IMAGE_SIZE
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
            if obs == 'image':
                image: np.ndarray = inner.physics.render(*frame, camera_id=camera)
                return image
            parts = [np.ravel(arrived.observation[key]) for key in sorted(arrived.observation)]
            return np.concatenate(parts).astype(np.float32)

        def close(self) -> None:
            inner.close()

    env, bounds = DMControl(), inner.action_spec()
    if obs == 'image':
        env.observation_space = gymnasium.spaces.Box(0, 255, (*frame, 3), np.uint8)
    else:
        width = sum(int(np.prod(part.shape)) for part in inner.observation_spec().values())
        env.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (width,), np.float32)
    low, high = bounds.minimum.astype(np.float32), bounds.maximum.astype(np.float32)
    env.action_space = gymnasium.spaces.Box(low, high, bounds.shape, np.float32)
    return Built(env, action_repeat=2)


def _gym(name: str, task: str, obs: str | None, size: tuple[int, ...] | None) -> Built:
    gymnasium = _need(name, 'gymnasium', 'gymnasium')
    try:
        env = gymnasium.make(task, disable_env_checker=True)
        if obs == 'image' and viewer(env.observation_space, obs, size, name) is None:
            env.close()
            env = gymnasium.make(task, disable_env_checker=True, render_mode='rgb_array')
    except (gymnasium.error.Error, ImportError) as error:
        raise EnvRefusedError(f'{name} cannot be made: {error}') from error
    return Built(env)


def camera(env: Any, name: str) -> Any:
    """Wrap an environment to observe its renderer. Raises EnvRefusedError if it has none."""
    from gymnasium.wrappers import AddRenderObservation

    if env.render_mode != 'rgb_array':
        raise EnvRefusedError(
            f"{name} has no images and render_mode={env.render_mode!r}; expected 'rgb_array'"
        )
    env.reset()  # renderers draw a state, and the wrapper renders at once
    return AddRenderObservation(env, render_only=True)


def viewer(space: Any, obs: str | None, size: tuple[int, ...] | None, name: str) -> ObsView | None:
    """Conversion of the observations of `space`, as 'image' [h, w, c] uint8, as 'state' (float32),
    or in their own form (None); None if an image is asked for and there is none.

    Images are resized to `size` by area. A state of several parts becomes one vector, keys sorted:
    a Discrete is one-hot, a MultiDiscrete one one-hot after the other, a Box its numbers; a grid up
    to 16 x 16 stays a grid. Raises EnvRefusedError for a space that has no array form.
    """
    from gymnasium import spaces

    parts = space.items() if isinstance(space, spaces.Dict) else ()
    images = [key for key, part in parts if _is_image(part)]
    if obs != 'state' and _is_image(space):
        return _image(space.shape, size, lambda x: x)
    if obs != 'state' and len(images) == 1:
        return _image(space[images[0]].shape, size, lambda x: x[images[0]])
    if obs == 'image':
        return None
    if isinstance(space, spaces.Box) and len(space.shape) == 3 and max(space.shape[:2]) <= 16:
        dtype = np.bool_ if space.dtype == np.bool_ else np.float32
        return ObsView(space.shape, dtype, lambda x: np.asarray(x, dtype))
    if not _is_flat(space):
        raise EnvRefusedError(
            f'{name} has observations {space}; expected numbers or choices of a fixed count'
        )
    width = spaces.flatdim(space)
    if width > LONGEST_STATE:
        raise EnvRefusedError(
            f'{name} has observations {space}, a vector of {width:,}; expected at most {LONGEST_STATE:,}'
        )
    shape = (width,)
    return ObsView(shape, np.float32, lambda x: np.asarray(spaces.flatten(space, x), np.float32))


def _is_flat(space: Any) -> bool:
    """True if a vector can hold the space: no text, no graphs, nothing whose length changes."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces
        return all(map(_is_flat, parts))
    flat = spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary
    return isinstance(space, flat)


def _is_image(space: Any) -> bool:
    shape: tuple[int, ...] = getattr(space, 'shape', None) or ()
    plain = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
    return plain and space.dtype == np.uint8 and min(shape[:2]) >= SMALLEST_IMAGE


def _image(
    shape: tuple[int, ...], size: tuple[int, ...] | None, pick: Callable[[Any], np.ndarray]
) -> ObsView:
    height, width = size or shape[:2]
    channels = shape[2] if len(shape) == 3 else 1
    resize = area_resizer((shape[0], shape[1]), (height, width))

    def see(obs: Any) -> np.ndarray:
        return resize(np.asarray(pick(obs)).reshape(*shape[:2], channels))

    return ObsView((height, width, channels), np.uint8, see)


def area_resizer(
    source: tuple[int, int], target: tuple[int, int]
) -> Callable[[np.ndarray], np.ndarray]:
    """Function that resizes uint8 images [h, w, c] -> [*target, c]; a pixel is the mean of the area
    it covers.
    """
    if source == target:
        return lambda image: image
    rows, columns = _shares(source[0], target[0]), _shares(source[1], target[1])

    def resize(image: np.ndarray) -> np.ndarray:
        height, width, channels = image.shape
        flat = image.reshape(height, width * channels).astype(np.float32)
        thin = (rows @ flat).reshape(-1, width, channels)
        resized: np.ndarray = np.rint(np.matmul(columns, thin)).astype(np.uint8)
        return resized

    return resize


def _shares(source: int, target: int) -> np.ndarray:
    """Share of each source pixel in each target pixel, [target, source]."""
    edges = np.arange(target + 1) * (source / target)
    pixels = np.arange(source)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    shares: np.ndarray = np.clip(overlap, 0.0, None) * (target / source)
    return shares.astype(np.float32)
