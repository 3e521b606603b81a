"""Every environment by its name: where it runs, how it is made, and the names near a mistaken one.

| name                | runs                                 | needs      |
|---------------------|--------------------------------------|------------|
| minatar/<game>      | on the device                        | nothing    |
| control/<task>      | on the device                        | nothing    |
| hidden_order/<n>    | on the device                        | nothing    |
| memory/<n>          | on the device                        | nothing    |
| gymnax/<Id>         | on the device                        | gymnax     |
| <module>:<name>     | on the device, of the reader's own   | the module |
| atari/<game>        | on the host, see `suites`            | ale-py     |
| dmc/<domain>_<task> | on the host                          | dm_control |
| crafter/reward      | on the host                          | crafter    |
| gym/<Id>            | on the host; gym/<module>:<Id> too   | gymnasium  |

Never imports JAX before an environment on the device is made.
"""

import difflib
import importlib.util
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from reverie.errors import UserError

if TYPE_CHECKING:
    from reverie.envs.host import HostVector
    from reverie.types import Env

ON_HOST = ('atari', 'dmc', 'crafter', 'gym')
ON_DEVICE = ('minatar', 'control', 'hidden_order', 'memory', 'gymnax')
ALIASES = {'ale': 'atari', 'dm_control': 'dmc', 'dmcontrol': 'dmc', 'gymnasium': 'gym'}
# modules that register the ids of a namespace, or of a prefix, with Gymnasium
MODULES = {'ALE': 'ale_py', 'MiniGrid': 'minigrid', 'BabyAI': 'minigrid', 'MiniWorld': 'miniworld'}


def on_host(name: str) -> bool:
    """Whether an environment runs in processes on the host; no claim that it exists."""
    return name.partition('/')[0] in ON_HOST


def make(
    name: str, copies: int | None = None, *, seed: int = 0, **options: Any
) -> 'Env | HostVector':
    """Make an environment on the device, or `copies` of one on the host.

    Raises UserError for an unknown name or option, a value of another type, and for copies of an
    environment on the device, of which `device.Vector` runs many.
    """
    if on_host(name):
        from reverie.envs import host

        return host.make(name, copies or 1, seed=seed, **options)
    if copies not in (None, 1):
        raise UserError(f'{name} with copies={copies}: it runs on the device; see device.Vector')
    from reverie.envs import device

    return device.make(name, **options)


def unknown(name: str) -> UserError:
    """The error for a name that is none, with the names near it."""
    if found := near(name):
        meant = ' or '.join(found[:3])
        return UserError(f'environment {name!r} is unknown; did you mean {meant}?')
    from reverie.envs import device

    names = device.names()
    same = [known for known in names if known.startswith(name.partition('/')[0] + '/')]
    others = (
        'gymnax/<Id>', 'atari/<game>', 'dmc/<domain>_<task>', 'crafter/reward', 'gym/<Id>',
        'gym/<module>:<Id>', '<module>:<name>',
    )  # fmt: skip
    expected = ', '.join(same or (*names, *others))
    return UserError(f'environment {name!r} is unknown; expected one of {expected}')


def near(name: str) -> list[str]:
    """Names that somebody may have meant, the likeliest first."""
    family, slash, task = name.partition('/')
    family = ALIASES.get(family.lower(), family.lower())
    known = _known()
    if slash and family in (*ON_HOST, *ON_DEVICE):
        guess = f'{family}/{task if family in ("gym", "gymnax") else snake(task)}'
        if guess != name and (guess in known or family in ('atari', 'dmc')):
            return [guess]
    return nearest(name, known)


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Those of the known names that are spelled like `name`, or nearly so."""
    last: Callable[[str], str] = lambda name: _plain(re.split('[/:]', name)[-1])
    known = list(known)
    if alike := [other for other in known if last(other) == last(name)]:
        newest_first = sorted(alike, reverse=True)
        return sorted(newest_first, key=lambda name: name.count('/'))  # the plainest first
    plain = {_plain(other): other for other in known}
    close = difflib.get_close_matches(_plain(name), list(plain), 3, 0.75)
    return [plain[match] for match in close]


def check(name: str) -> None:
    """Raise UserError for a name that cannot be one of a host environment's."""
    family, _, task = name.partition('/')
    misspelt = (family == 'atari' and task != snake(task)) or (family == 'dmc' and '-' in task)
    if family not in ON_HOST or not task or misspelt:
        raise unknown(name)


def snake(task: str) -> str:
    """'SpaceInvaders-v5' -> 'space_invaders', as Atari and DeepMind Control write them."""
    task = re.sub(r'(NoFrameskip)?-v\d+$', '', task)
    words = re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', task.rpartition('/')[2])
    return re.sub(r'[^a-z0-9]+', '_', words.lower()).strip('_')


def _plain(name: str) -> str:
    """A name without case, version and punctuation."""
    return re.sub(r'[^a-z0-9]', '', re.sub(r'-v\d+$', '', name).lower())


def _known() -> list[str]:
    """The names that are known without making anything: ours, and Gymnasium's own."""
    from reverie.envs import device

    found = list(device.names())
    if importlib.util.find_spec('gymnasium') is not None:
        import gymnasium

        found += [f'gym/{name}' for name in gymnasium.registry]
    return found
