"""Serving the page of `reverie play`, from a name to an address, in stages that can be seen."""

import contextlib
import time
import webbrowser
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from reverie.commands.doctor import matmul_tflops
from reverie.commands.play.setup import open_session, resolve_play
from reverie.commands.programs import keep_programs
from reverie.evaluation.results import device_name
from reverie.nn.core import count
from reverie.serve.engine import Engine
from reverie.serve.estimate import flops
from reverie.serve.guard import Guard, new_token
from reverie.serve.messages import is_symbolic
from reverie.serve.powers import with_steps
from reverie.serve.recording import Saver
from reverie.serve.server import App, bind, hello, serve
from reverie.serve.session import Session
from reverie.types import UserError

Say = Callable[[str], None]


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
    cache: bool = True,
    say: Say = print,
) -> None:
    """Serve the page until Ctrl-C. Raises UserError for whatever the user can mend."""
    if not 1 <= players <= 64:
        raise UserError(f'--players {players}: expected 1 to 64')
    if not 1 <= pace <= 120:
        raise UserError(f'--fps {pace:g}: expected 1 to 120')
    with contextlib.ExitStack() as left:
        sock = left.enter_context(contextlib.closing(bind(host, port)))
        keep_programs(cache)
        begin = time.perf_counter()
        stage = lambda i, text: say(f'[{i}/5 {time.perf_counter() - begin:5.1f} s] {text}')
        stage(1, f'device: {device_name()}')
        setup = resolve_play(name, env_name, options or {}, seed)
        if steps is not None:
            try:
                setup.agent = with_steps(setup.agent, steps)
            except UserError as error:
                raise UserError(f'--steps {steps}: {error}') from None
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
