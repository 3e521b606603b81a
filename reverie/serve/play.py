"""`reverie play RUN|PRESET`: from a name to a page, in stages that can be seen."""

import contextlib
import dataclasses
import os
import pathlib
import time
import webbrowser
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from reverie.agents import presets
from reverie.commands.doctor import matmul_tflops
from reverie.commands.experiment import Experiment, Hosted, Recorded, describe, load, played
from reverie.envs.host import HostVector
from reverie.evaluation.returns import device_name
from reverie.evaluation.video import PALETTE
from reverie.nn.core import count
from reverie.serve import keys
from reverie.serve.contexts import Contexts
from reverie.serve.engine import Engine
from reverie.serve.estimate import flops
from reverie.serve.guard import Guard, new_token
from reverie.serve.hosted import HostSession
from reverie.serve.recording import Saver
from reverie.serve.server import App, bind, serve
from reverie.serve.session import Session
from reverie.types import Params, Playable, Step, UserError

Say = Callable[[str], None]
CONTEXT = 8  # frames before a start


@dataclasses.dataclass
class PlaySetup:
    """Who is played where. params: a function, so that the expensive part can wait."""

    title: str
    agent: Playable
    experiment: Experiment  # has the environment
    params: Callable[[], Params]
    contexts: Callable[[int], Step] | None
    folder: pathlib.Path  # for recordings
    facts: dict[str, Any]


def resolve_play(name: str, env_name: str | None, options: dict[str, Any], seed: int) -> PlaySetup:
    """A run folder, or a preset with random weights. Raises UserError if it is neither."""
    folder = pathlib.Path(name)
    if name in presets.PRESETS and not (folder / 'config.json').exists():
        return _of_preset(name, env_name, options, seed)
    if not folder.exists():
        raise UserError(
            f'{name!r} is neither a run folder nor a preset; presets are {", ".join(presets.PRESETS)}'
        )
    if env_name or options:
        raise UserError('--env and --env-options go with a preset; a run has its own environment')
    experiment = describe(folder)
    if not 0 <= seed < experiment.seeds:
        raise UserError(
            f'--seed {seed}: expected 0 to {experiment.seeds - 1}, the seeds of the run'
        )
    agent = experiment.agent

    def params() -> Params:
        found = jax.tree.map(lambda x: x[seed], load(folder)[1])
        check_params(agent, found, str(folder))
        return found

    contexts = Contexts(experiment.episodes, CONTEXT) if isinstance(experiment, Recorded) else None
    facts = {'source': 'play', 'run': folder.name, 'env': {'name': experiment.env_name}}
    title = f'{experiment.preset} on {experiment.env_name}'
    return PlaySetup(title, agent, experiment, params, contexts, folder / 'plays', facts)


def _of_preset(name: str, env_name: str | None, options: dict[str, Any], seed: int) -> PlaySetup:
    config = presets.get(name)
    env_name = env_name or ('control/pendulum' if name.startswith('planet') else 'minatar/breakout')
    experiment = played(env_name)(name, config, env_name, options=options)
    agent = presets.make(config, experiment.spec)
    facts = {'source': 'play', 'preset': name, 'env': {'name': env_name, 'options': options}}
    folder = pathlib.Path('runs') / 'plays' / name
    title = f'{name} on {env_name}, random weights'
    return PlaySetup(
        title, agent, experiment, lambda: agent.init(jax.random.key(seed)), None, folder, facts
    )


def open_session(setup: PlaySetup, players: int, seed: int) -> Session:
    """Without weights yet."""
    shapes = jax.eval_shape(setup.agent.init, jax.random.key(0))
    how: dict[str, Any] = dict(slots=players, context=CONTEXT, seed=seed)
    experiment = setup.experiment
    if not isinstance(experiment, Hosted):
        return Session(setup.agent, shapes, experiment.env, setup.contexts, **how)
    make = lambda slot: HostVector(
        experiment.env_name, 1, seed=3 * 10**6 + slot, **experiment.options
    )
    return HostSession(setup.agent, shapes, make, **how)


def check_params(agent: Playable, params: Params, where: str) -> None:
    """Raises UserError naming the first array that does not fit the agent."""
    shapes = lambda tree: {
        jax.tree_util.keystr(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    given, expected = shapes(params), shapes(jax.eval_shape(agent.init, jax.random.key(0)))
    for name in sorted(given.keys() | expected.keys()):
        if given.get(name) != expected.get(name):
            raise UserError(
                f'{where}: weights{name} have shape {given.get(name)}, the agent of its config expects '
                f'{expected.get(name)}; a checkpoint of another config?'
            )


def hello(session: Session, title: str, symbolic: bool) -> dict[str, Any]:
    """What a page is told of the agent and the environment."""
    spec = session.agent.spec
    channels = [
        {'name': name, 'colour': PALETTE[i % len(PALETTE)].tolist()}
        for i, name in enumerate(spec.channels)
    ]
    return {
        'title': title,
        'env': spec.name,
        'kind': spec.actions.kind,
        'rest': keys.rest(spec.actions),
        'bindings': [b.plain() for b in keys.bindings(spec.actions)],
        'views': session.views,
        'sources': session.sources,
        'steps_choices': session.steps_choices,
        'channels': channels if symbolic else [],
    }


def is_symbolic(spec: Any) -> bool:
    """Whether pictures are grids of symbols rather than grey or colour images."""
    shape = spec.obs_shape
    return (
        isinstance(shape, tuple)
        and len(shape) == 3
        and (bool(spec.channels) or shape[-1] not in (1, 3))
    )


def play(
    name: str,
    *,
    env_name: str | None = None,
    options: dict[str, Any] | None = None,
    host: str = '127.0.0.1',
    port: int = 8000,
    players: int = 2,
    pace: float = 20.0,
    seed: int = 0,
    browser: bool = True,
    names: tuple[str, ...] = (),
    steps: int | None = None,
    token: str | None = None,
    say: Say = print,
) -> None:
    """Serve the page until Ctrl-C. Raises UserError for whatever the user can mend."""
    if not 1 <= players <= 64:
        raise UserError(f'--players {players}: expected 1 to 64')
    if not 1 <= pace <= 120:
        raise UserError(f'--fps {pace:g}: expected 1 to 120')
    with contextlib.ExitStack() as left:
        sock = left.enter_context(contextlib.closing(bind(host, port)))
        keep_programs()
        begin = time.perf_counter()
        stage = lambda i, text: say(f'[{i}/5 {time.perf_counter() - begin:5.1f} s] {text}')
        stage(1, f'device: {device_name()}')
        setup = resolve_play(name, env_name, options or {}, seed)
        if steps is not None:
            choices = getattr(setup.agent, 'sampling_steps', ())
            if steps not in choices:
                raise UserError(
                    f'--steps {steps}: expected one of {choices}'
                    if choices
                    else f'--steps: {name} has none'
                )
            setup.agent = setup.agent.with_sampling_steps(steps)  # type: ignore[attr-defined]
        session = left.enter_context(contextlib.closing(open_session(setup, players, seed)))
        stage(2, f'{setup.title}: {expectation(session)}')
        session.load(setup.params())
        stage(3, f'weights: {count(session.params):,} numbers')
        fps = warm(session)
        stage(
            4,
            f'compiled; {fps:,.0f} frames/s for {players} player{"s" if players > 1 else ""} at most, {pace:g} wanted',
        )
        port = sock.getsockname()[1]
        guard = Guard(host, port, token or new_token(), tuple(n.lower() for n in names))
        symbolic = is_symbolic(setup.agent.spec)
        engine = Engine(
            session, pace=pace, symbolic=symbolic, saver=Saver(setup.folder, setup.facts)
        )
        at = host if host not in ('0.0.0.0', '::') else '127.0.0.1'
        url = f'http://{f"[{at}]" if ":" in at else at}:{port}/?token={guard.token}'

        def ready() -> None:
            stage(5, f'play at {url}   (Ctrl-C ends)')
            if browser:
                webbrowser.open(url)

        serve(App(engine, guard, hello(session, setup.title, symbolic)), sock, ready)


def keep_programs() -> None:
    """What was compiled once is found again the next time, unless the user keeps such a cache
    elsewhere.
    """
    if getattr(jax.config, 'jax_compilation_cache_dir', None) is None:
        home = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')
        jax.config.update('jax_compilation_cache_dir', str(home / 'reverie' / 'programs'))


def expectation(session: Session) -> str:
    """How fast frames can come at the very best, from counting and a measured matrix product."""
    program = session.trace().jaxpr
    speed = matmul_tflops(1024 if jax.default_backend() == 'cpu' else 8192, 'float32') * 1e12
    person, agent = flops(program, min), flops(program, max)
    rate = lambda work: f'{min(speed / work, 1000):,.{0 if speed > 10 * work else 1}f}'
    planning = f', {rate(agent)} while the agent plans' if agent > 1.01 * person else ''
    return f'{person / 1e9:.2g} GFLOP a frame, expect at most {rate(person)} frames/s{planning}'


def warm(session: Session, frames: int = 20) -> float:
    """Compile what comes first, the start and the dream, and play a little. -> frames per second"""
    n, size = session.slots, session.agent.spec.actions.size
    for source in session.sources:
        for slot in range(n):
            session.start(slot, 0, source)
    yes = np.ones(n, bool)
    step = lambda: jax.block_until_ready(session.frame(np.zeros((n, size)), ~yes, yes))
    step()
    begin = time.perf_counter()
    for _ in range(frames):
        step()
    return frames / (time.perf_counter() - begin)
