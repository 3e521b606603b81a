"""Serving the page of `reverie play`, from a name to an address, in stages that can be seen."""

import contextlib
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from reverie.commands.doctor import matmul_tflops
from reverie.commands.play.browser import opener
from reverie.commands.play.setup import open_session, resolve_play
from reverie.commands.programs import keep_programs
from reverie.evaluation.results import device_name
from reverie.nn.core import count
from reverie.serve.engine import Engine
from reverie.serve.estimate import flops
from reverie.serve.guard import Guard, new_token
from reverie.serve.messages import is_symbolic
from reverie.serve.powers import with_steps
from reverie.serve.recording import RecordingSaver
from reverie.serve.server import App, bind, hello, serve
from reverie.serve.session import Session
from reverie.types import Playable, UserError

Say = Callable[[str], None]


def play(
    name: str,
    *,
    env_name: str | None = None,
    options: dict[str, Any] | None = None,
    data: Sequence[pathlib.Path] = (),
    task: str | None = None,
    host: str = '127.0.0.1',
    port: int = 8000,
    players: int = 2,
    pace: float = 20.0,
    seed: int = 0,
    browser: bool = True,
    names: tuple[str, ...] = (),
    steps: int | None = None,
    recordings: float = 2.0,
    token: str | None = None,
    cache: bool = True,
    say: Say = print,
) -> None:
    """Serve the page of a run or preset until Ctrl-C.

    Args:
        name: run folder, or preset with random weights.
        env_name, options: environment of a preset.
        data: recordings of a run, if they are not where they were.
        task: to tell the agent, of a run on several.
        players: places.
        pace: frames per second of a new page.
        seed: of the run's seeds.
        names: further host names to answer to.
        steps: K to begin with, for agents that have a choice.
        recordings: gigabytes of them that the run may have.
        token: part of the address; a new one if not given.
        cache: keep compiled programs for the next time.

    Raises UserError for whatever the user can put right.
    """
    if not 1 <= players <= 64:
        raise UserError(f'--players {players}: expected 1 to 64')
    if not 1 <= pace <= 120:
        raise UserError(f'--fps {pace:g}: expected 1 to 120')
    if not 0 <= recordings < math.inf:
        raise UserError(f'--recordings {recordings:g}: expected gigabytes, 0 or more')
    with contextlib.ExitStack() as left:
        sock = left.enter_context(contextlib.closing(bind(host, port)))
        keep_programs(cache)
        begin = time.perf_counter()

        def stage(i: int, text: str) -> None:
            say(f'[{i}/5 {time.perf_counter() - begin:5.1f} s] {text}')

        stage(1, f'device: {device_name()}')
        setup = resolve_play(name, env_name, options or {}, seed, data, task)
        if steps is not None:
            setup.agent = _with_steps(setup.agent, steps)
        session = left.enter_context(contextlib.closing(open_session(setup, players, seed)))
        stage(2, f'{setup.title}: {expectation(session)}')
        session.load(setup.params())
        stage(3, f'weights: {count(session.params):,} numbers')
        fps, places = warm(session), f'{players} player{"s" if players > 1 else ""}'
        stage(4, f'compiled; {fps:,.0f} frames/s for {places} at most, {pace:g} wanted')
        port = sock.getsockname()[1]
        guard = Guard(host, port, token or new_token(), tuple(n.lower() for n in names))
        symbolic = is_symbolic(setup.agent.spec)
        saver = RecordingSaver(setup.folder, setup.facts, int(1e9 * recordings), players)
        engine = Engine(session, pace=pace, symbolic=symbolic, saver=saver)
        url = address(host, port, guard.token)
        open_page = left.enter_context(opener())

        def ready() -> None:
            stage(5, f'play at {url}   (Ctrl-C ends)')
            if browser:
                open_page(url)

        serve(App(engine, guard, hello(session, setup.title, symbolic)), sock, ready)


def _with_steps(agent: Playable, steps: int) -> Playable:
    try:
        return with_steps(agent, steps)
    except UserError as error:
        raise UserError(f'--steps {steps}: {error}') from None


def address(host: str, port: int, token: str) -> str:
    """URL of the page on this machine."""
    at = host if host not in ('0.0.0.0', '::') else '127.0.0.1'
    return f'http://{f"[{at}]" if ":" in at else at}:{port}/?token={token}'


def expectation(session: Session) -> str:
    """Frames per second to expect at most, from counting and a measured matrix product."""
    program = session.trace().jaxpr
    speed = matmul_tflops(1024 if jax.default_backend() == 'cpu' else 8192, 'float32') * 1e12
    person, agent = flops(program, min), flops(program, max)

    def rate(work: float) -> str:
        return f'{min(speed / work, 1000):,.{0 if speed > 10 * work else 1}f}'

    planning = f', {rate(agent)} while the agent plans' if agent > 1.01 * person else ''
    return f'{person / 1e9:.2g} GFLOP a frame, expect at most {rate(person)} frames/s{planning}'


def warm(session: Session, frames: int = 20) -> float:
    """Compile what comes first, the start and the dream, and play a little.

    Returns frames per second.
    """
    n, size = session.slots, session.agent.spec.actions.size
    for source in session.sources:
        for slot in range(n):
            session.start(slot, 0, source)
    yes = np.ones(n, bool)

    def step() -> None:
        jax.block_until_ready(session.frame(np.zeros((n, size)), ~yes, yes))

    step()
    begin = time.perf_counter()
    for _ in range(frames):
        step()
    return frames / (time.perf_counter() - begin)
