"""Runs: every phase of an agent, logged, checkpointed, and resumed exactly where it was."""

import contextlib
import pathlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from reverie.data.source import Source
from reverie.training import checkpoint, warm
from reverie.training.compilation import Compiler
from reverie.training.held_out import HeldOut
from reverie.training.latents import LatentCache
from reverie.training.legacy import read_config
from reverie.training.loop import Loop, Position, Scoring, begun, restored
from reverie.training.metrics import Jsonl, Sink
from reverie.training.progress import Clock
from reverie.training.run_folder import (
    CADENCE,
    Saver,
    check_run_config,
    fingerprint,
    lengthened,
    lock,
    save_run_config,
)
from reverie.training.setup import TrainSetup
from reverie.training.signals import caught_signals
from reverie.types import Agent, Params, Tokenizing, UserError


def run(
    agent: Agent,
    source: Source,
    folder: str | pathlib.Path,
    *,
    seed: int = 0,
    seeds: int = 1,
    checkpoint_every_s: float = 300.0,
    log_every_s: float = 5.0,
    updates_per_call: int = 50,
    sinks: Sequence[Sink] = (),
    scoring: Scoring | None = None,
    held_out: Source | None = None,
    init: warm.Init | None = None,
    config: Any = None,
    safe: Sequence[str] = CADENCE,
    max_streak: int = 10,
    max_to_keep: int = 2,
    keep_phase_ends: bool = False,
    mesh: Mesh | None = None,
    wait_lock_s: float | None = None,
) -> Params:
    """Train every phase of `agent` for `seeds` seeds at once; return params, each leaf [seeds, ...].

    source: a dataset, or environments with their replay, on the device or the host. Each phase
        begins with new environments and an empty replay.
    folder: holds config.json, metrics.jsonl and checkpoints/; the same call again continues where
        it was, exactly (but for environments on the host, which start afresh).
    seed: seed i of the run trains with `seed + i`, just as it would alone.
    updates_per_call: gradient steps between two looks at the clock and at signals.
    sinks: besides metrics.jsonl, which is always written. They are closed at the end.
    scoring: how the agent is scored along the way, if it is.
    held_out: recordings that nothing is trained on, whose losses are logged.
    init: the run that finished phases or parameter groups are taken from, if any; the rest begins
    fresh.
    config: a dataclass or dict, saved; a folder made with another is refused unless the key is in
        `safe` (dotted paths; 'optimiser' covers 'optimiser.learning_rate').
    max_streak: non-finite updates in a row, of any seed, after which training stops.
    keep_phase_ends: keep the checkpoint at the end of every phase, with the optimiser's state where
        the source is a dataset, so that other runs can take the phase from here and train it on.
    wait_lock_s: seconds to wait for another process that trains in the folder, see `lock`.

    Raises UserError for another config, a folder that another process holds, damaged checkpoints,
    or losses that stay non-finite (nothing is saved then), ExportError for a replay that could not
    be exported after everything was saved; the batch of a skipped update is left in
    faults/. Raises OutOfMemoryError if an update does not fit. SIGTERM and Ctrl-C save first, then
    raise SystemExit(75) and SystemExit(130).
    """
    folder = pathlib.Path(folder)
    _check_arguments(agent, seeds, updates_per_call)
    record, start = warm.remembered(folder, init), None
    if init is not None and record is None:
        start = warm.plan(init, agent, fingerprint(agent.phases, config, seed, seeds))
        record = start.record
    setup = TrainSetup(
        agent=agent,
        phases=warm.outline(agent.phases, record),
        given=frozenset((record or {}).get('phases', ())),
        source=source,
        keys=jax.vmap(jax.random.split)(
            jnp.stack([jax.random.key(seed + i) for i in range(seeds)])
        ),
        mesh=mesh,
        latents=_latents(agent, folder, source, held_out),
    )
    checkpoints = checkpoint.CheckpointManager(folder / 'checkpoints', max_to_keep, keep_phase_ends)
    checkpoints.folder.mkdir(parents=True, exist_ok=True)
    config = fingerprint(setup.phases, config, seed, seeds, record)
    check_run_config(folder, config, safe)  # a folder that is refused is left as it is
    _check_longer(setup, folder, config)
    log = Jsonl(folder / 'metrics.jsonl')
    clock = Clock(time.monotonic())
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock(folder, wait_lock_s))
        save_run_config(folder, config, safe)
        checkpoint.clean(checkpoints.folder)
        for sink in (log, *sinks):
            stack.callback(sink.close)
        signals = stack.enter_context(caught_signals())
        executor = ThreadPoolExecutor(max(1, len(setup.phases) - 1), 'compiler')
        stack.callback(executor.shutdown, wait=False, cancel_futures=True)
        setup.check_source()
        loop = Loop(
            setup=setup,
            compiler=Compiler(setup, updates_per_call, executor, signals),
            saver=Saver(
                setup, checkpoints, config, clock, signals, checkpoint_every_s, clock.started
            ),
            sinks=(log, *sinks),
            scoring=scoring,
            held_out=None if held_out is None else HeldOut(held_out),
            log_every_s=log_every_s,
            updates_per_call=updates_per_call,
            max_streak=max_streak,
        )
        # Nothing but the loop holds the first parameters, which would stay in memory to the end.
        return loop.run(_position(setup, checkpoints.folder, start, log, clock))


def _latents(
    agent: Agent, folder: pathlib.Path, source: Source, held_out: Source | None
) -> LatentCache | None:
    """The cache of an agent that learns from a tokenizer's latents of recordings, if it does."""
    if not source.recordings or not isinstance(agent, Tokenizing):
        return None
    if not (agent.caches_latents or agent.scales_latents):
        return None
    sources = {'train': source} | ({} if held_out is None else {'held_out': held_out})
    return LatentCache(folder, agent, sources)


def _check_longer(setup: TrainSetup, folder: pathlib.Path, config: dict[str, Any]) -> None:
    """Raise UserError for more updates of a last phase that cannot go on beyond those it had."""
    steps = checkpoint.steps(folder / 'checkpoints')
    if not steps or not lengthened(read_config(folder), config):
        return
    meta, phase = checkpoint.meta_of(steps[-1]), setup.phases[-1]
    begun = meta['phase_index'] == len(setup.phases) - 1
    why = None
    if begun and phase.scheduled:
        why = 'its learning rate was planned for these'
    elif begun and meta['complete'] and meta['arrays']['train'] is None:
        why = 'the version that ended it kept neither its optimiser nor its replay'
    if why is not None:
        had = read_config(folder)['phases'][phase.name]['steps']
        raise UserError(
            f'{folder}: phase {phase.name} was made for {had} updates and cannot have '
            f'{phase.steps}: {why}; use another folder'
        )


def _position(
    setup: TrainSetup, folder: pathlib.Path, start: warm.Start | None, log: Jsonl, clock: Clock
) -> Position:
    """Find where training goes on, or begin it; log and clock go on from there."""
    found = restored(setup, folder)
    log.drop_after(found.gradient_steps if found else 0)
    clock.before = found.seconds if found else 0.0
    return found or begun(setup, start)


def _check_arguments(agent: Agent, seeds: int, updates_per_call: int) -> None:
    names = [phase.name for phase in agent.phases]
    if len(set(names)) < len(names):
        raise UserError(f'phase names must be unique, got {names}')
    if seeds < 1 or updates_per_call < 1:
        raise UserError(
            f'seeds and updates_per_call must be at least 1, got {seeds} and {updates_per_call}'
        )
