"""The training loop: phases in order, logged, checkpointed, and resumed exactly where they were."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import Array, PRNGKeyArray, PyTree

from reverie.io import write_json
from reverie.training import checkpoint, faults, state, warm
from reverie.training.checkpoint import flatten
from reverie.training.legacy import modernise
from reverie.training.metrics import Jsonl, Sink
from reverie.training.state import TrainState
from reverie.training.update import Program, SkippedUpdate, call_size, make_program
from reverie.types import Agent, Mean, Metrics, Params, Phase, Source, UserError

CADENCE = ('checkpoint_every_s', 'log_every_s')


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Scores while training, which go into the record of that update.

    every: environment frames of one seed between two scores; taken at the end of the call that
    passes a multiple.
    play: params [seeds, ...] -> {name: [seeds]}; a function of the weights alone, so that a resumed
    run repeats it.
    """

    every: int
    play: Callable[[Params], Mapping[str, np.ndarray]]


EXIT = {
    signal.SIGTERM: 75,
    signal.SIGINT: 130,
}  # 75: try again later (sysexits), so a scheduler requeues


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
    init: warm.Init | None = None,
    config: Any = None,
    safe: Sequence[str] = CADENCE,
    max_streak: int = 10,
    max_to_keep: int = 2,
    keep_phase_ends: bool = False,
    mesh: Mesh | None = None,
) -> Params:
    """Train every phase of `agent` for `seeds` seeds at once; -> params, each leaf [seeds, ...].

    source: a dataset, or environments with their replay, on the device or the host. Each phase
        begins with new environments and an empty replay.
    folder: holds config.json, metrics.jsonl and checkpoints/; the same call again continues where
        it was, exactly (but for environments on the host, which start anew).
    seed: seed i of the run trains with `seed + i`, just as it would alone.
    updates_per_call: gradient steps between two looks at the clock and at signals.
    sinks: besides metrics.jsonl, which is always written. They are closed at the end.
    scoring: how the agent is scored along the way, if it is.
    init: the run that finished phases or parameter groups are taken from, if any; the rest begins
    fresh.
    config: a dataclass or dict, saved; a folder made with another is refused unless the key is in
        `safe` (dotted paths; 'optimiser' covers 'optimiser.learning_rate').
    max_streak: non-finite updates in a row, of any seed, after which training stops.
    keep_phase_ends: keep the checkpoint at the end of every phase, with the optimiser's state where
        the source is a dataset, so that other runs can take the phase from here and train it on.

    Raises UserError for another config, damaged checkpoints, or losses that stay non-finite
    (nothing is saved then); the batch of a skipped update is left in faults/. Raises
    OutOfMemoryError if an update does not fit. SIGTERM and Ctrl-C save first, then raise
    SystemExit(75) and SystemExit(130).
    """
    folder = pathlib.Path(folder)
    names = [phase.name for phase in agent.phases]
    if len(set(names)) < len(names):
        raise UserError(f'phase names must be unique, got {names}')
    if seeds < 1 or updates_per_call < 1:
        raise UserError(
            f'seeds and updates_per_call must be at least 1, got {seeds} and {updates_per_call}'
        )
    record, start = warm.remembered(folder, init), None
    if init is not None and record is None:
        start = warm.plan(init, agent, fingerprint(agent.phases, config, seed, seeds))
        record = start.record
    phases = warm.outline(agent.phases, record)
    (folder / 'checkpoints').mkdir(parents=True, exist_ok=True)
    config = check_run_config(folder, fingerprint(phases, config, seed, seeds, record), safe)
    checkpoint.clean(folder / 'checkpoints')
    log = Jsonl(folder / 'metrics.jsonl')
    loop = _Loop(
        agent=agent,
        phases=phases,
        given=frozenset((record or {}).get('phases', ())),
        start=start,
        source=source,
        keys=jax.vmap(jax.random.split)(
            jnp.stack([jax.random.key(seed + i) for i in range(seeds)])
        ),
        config=config,
        checkpoints=checkpoint.CheckpointManager(
            folder / 'checkpoints', max_to_keep, keep_phase_ends
        ),
        log=log,
        sinks=(log, *sinks),
        scoring=scoring,
        mesh=mesh,
        checkpoint_every_s=checkpoint_every_s,
        log_every_s=log_every_s,
        updates_per_call=updates_per_call,
        max_streak=max_streak,
    )
    try:
        with caught_signals() as signals, ThreadPoolExecutor(1, 'compiler') as compiler:
            return loop.run(signals, compiler)
    finally:
        for sink in loop.sinks:
            sink.close()


def fingerprint(
    phases: Sequence[Phase],
    config: Any,
    seed: int,
    seeds: int,
    record: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What makes a run what it is, as JSON: the config, the seeds, the outline of the phases, and
    its warm start.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    outline = {
        p.name: dict(trains=p.trains, steps=p.steps, batch=p.batch, length=p.length) for p in phases
    }
    value = {'seed': seed, 'seeds': seeds, 'phases': outline, **dict(config or {})}
    value |= {'from': record} if record else {}
    return json.loads(json.dumps(value, default=str))


def check_run_config(
    folder: pathlib.Path, config: dict[str, Any], safe: Sequence[str]
) -> dict[str, Any]:
    """Save `config` in a run folder.

    Raises UserError naming each differing key if the folder was made with another.
    """
    path = folder / 'config.json'
    if path.exists():
        try:
            saved, given = flatten(modernise(json.loads(path.read_text()))), flatten(config)
        except ValueError as error:
            raise UserError(
                f'{path} is not JSON ({error}); delete {folder} to start anew'
            ) from error
        missing = '(absent)'
        differing = [
            f'{key}: saved {saved.get(key, missing)!r}, given {given.get(key, missing)!r}'
            for key in sorted(set(saved) | set(given))
            if saved.get(key, missing) != given.get(key, missing)
            and not any(key == s or key.startswith(f'{s}.') for s in safe)
        ]
        if differing:
            raise UserError(
                f'{folder} was made with another config; {"; ".join(differing)}; use another folder'
            )
    write_json(path, config)
    return config


@contextlib.contextmanager
def caught_signals() -> Iterator[list[signal.Signals]]:
    """SIGTERM and SIGINT append to the list instead of ending the process; a second Ctrl-C
    interrupts at once.
    """
    caught: list[signal.Signals] = []

    def handle(number: int, frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number))

    if (
        threading.current_thread() is not threading.main_thread()
    ):  # Python delivers signals to the main thread only
        yield caught
        return
    before = {number: signal.signal(number, handle) for number in EXIT}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclasses.dataclass
class _Call:
    """One dispatched call of a program whose results nobody has looked at yet."""

    step: int  # updates of the phase after it
    updates: int
    metrics: Metrics
    streak: Array  # [seeds, updates]
    history: Mapping[str, Array]
    memory: PyTree  # [seeds, updates, B, T, ...] for a replay on the host, else None
    skipped: SkippedUpdate  # [seeds, ...] of the first update that was skipped


@dataclasses.dataclass
class _Loop:
    """The state of a run on the host."""

    agent: Agent
    phases: tuple[
        Phase, ...
    ]  # the agent's, those taken from another run with the updates they had there
    given: frozenset[str]  # names of the phases taken from another run
    start: warm.Start | None  # a warm start, until the run has a checkpoint of its own
    source: Source
    keys: Array  # [seeds, 2]: for initialisation, for training
    config: dict[str, Any]
    checkpoints: checkpoint.CheckpointManager
    log: Jsonl
    sinks: tuple[Sink, ...]
    scoring: Scoring | None
    mesh: Mesh | None
    checkpoint_every_s: float
    log_every_s: float
    updates_per_call: int
    max_streak: int

    def run(self, signals: list[signal.Signals], compiler: Executor) -> Params:
        """Restore, then every phase that is left.

        compiler: compiles the next phase while one trains.
        """
        self.signals, self.started, self.seconds_before = signals, time.monotonic(), 0.0
        self.saved_at, self.compiler = self.started, compiler
        self.program: Program | None = None  # of the phase that trains
        self.ahead: Future[tuple[Program, Any]] | None = None  # `_compile` of the next one
        self._check_source()
        first, resumed, params = 0, None, None
        found = checkpoint.restore_latest(self.checkpoints.folder, self._target)
        if found is not None:
            params, train, meta = found
            first, self.seconds_before = meta['phase_index'] + meta['complete'], meta['seconds']
            self.source.set_state(meta['source'])
            if train is not None:
                self.source.set_arrays(train.pop('host'))
                resumed = TrainState(params, **train)
            done = first == len(self.phases)
            checkpoint.warn(
                f'every phase is complete ({meta["gradient_steps"]} gradient steps)'
                if done
                else f'resuming after {meta["phase"]}/{meta["step"]} ({meta["gradient_steps"]} gradient steps in all)'
            )
        self.log.drop_after(found[2]['gradient_steps'] if found else 0)
        if params is None:
            params = self._init()
            if self.start is not None:
                first, params, resumed = self._take(self.start, params)
        for index in range(first, len(self.phases)):
            if self.phases[index].name in self.given:
                self._save(index, params, None, self.phases[index].steps)
                continue
            with faults.short_memory(self.phases[index], self.keys.shape[0]):
                params = self._phase(
                    index, resumed if resumed is not None else self._begin(index, params)
                )
            resumed = None
        return params

    @property
    def seconds(self) -> float:
        """Seconds of training since the first start, whatever the wall clock does."""
        return self.seconds_before + time.monotonic() - self.started

    def _init(self) -> Params:
        """Seed by seed, so that each starts as it would alone; not jitted, what runs once is not
        worth compiling.
        """
        each = [self.agent.init(key) for key in self.keys[:, 0]]
        return jax.tree.map(lambda *x: jnp.stack(x), *each)

    def _take(self, start: warm.Start, fresh: Params) -> tuple[int, Params, TrainState | None]:
        """-> (number of the first phase to train, params with what is taken, its train state if it
        goes on).
        """
        checkpoint.warn(start.line)
        params, phase = start.weights(fresh), self.phases[start.first]
        if start.extends is None:
            return start.first, params, None
        if not {'dataset', 'label_fraction'} & set(start.record['differs']):
            self.source.set_state(start.extends.meta['source'])
        return start.first, params, start.resume(params, self._expected(start.first), phase)

    def _begin(self, index: int, params: Params) -> TrainState:
        """The state at the start of a phase, every leaf in its own buffer, laid out over the mesh."""
        phase = self.phases[index]

        def begin(params: Params) -> TrainState:
            return state.own_buffers(
                state.create(phase.begin(params) if phase.begin else params, phase)
            )

        train = jax.jit(jax.vmap(begin))(params)
        live = jax.jit(jax.vmap(functools.partial(self._begin_live, phase)))(
            train.params, self._phase_keys(index)
        )
        train = train._replace(live=live)
        return jax.device_put(train, self._layout(train))

    def _begin_live(self, phase: Phase, params: Params, key: PRNGKeyArray) -> PyTree:
        """Environments and replay of one seed; updates take the keys from 0 on, this the last one."""
        return self.source.begin(
            params, jax.random.fold_in(key, 2**32 - 1), phase.batch, phase.length
        )

    def _phase_keys(self, index: int) -> Array:
        """[seeds]"""
        return jax.vmap(lambda key: jax.random.fold_in(key, index))(self.keys[:, 1])

    def _layout(self, train: TrainState) -> PyTree:
        """Where each leaf [seeds, ...] lies."""
        if self.mesh is None:
            one = SingleDeviceSharding(jax.devices()[0])
            return jax.tree.map(lambda x: one, train)
        return state.train_sharding(self.mesh, train)

    def _shapes(self, index: int) -> TrainState:
        """Shapes of one seed's train state in a phase, without `live`."""
        params = jax.eval_shape(self.agent.init, self.keys[0, 0])
        for phase in self.phases[: index + 1]:
            train = jax.eval_shape(
                lambda p, f=phase: state.create(f.begin(p) if f.begin else p, f), params
            )
            params = train.params
        return train

    def _check_source(self) -> None:
        """Raises UserError before anything is trained if the environments and replay of a phase
        cannot be.
        """
        for index, phase in enumerate(self.phases):
            self.source.check(
                self._shapes(index).params, phase.batch, phase.length, self.keys.shape[0]
            )

    def _expected(self, index: int) -> TrainState:
        """What `_begin` gives: shapes [seeds, ...] and where they lie."""
        seeds, phase, train = self.keys.shape[0], self.phases[index], self._shapes(index)
        live = jax.eval_shape(
            functools.partial(self._begin_live, phase), train.params, self.keys[0, 0]
        )
        train = train._replace(live=live)
        train = jax.tree.map(lambda x: jax.ShapeDtypeStruct((seeds, *x.shape), x.dtype), train)
        where = self._layout(train)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), train, where
        )

    def _target(self, meta: checkpoint.Meta) -> tuple[PyTree, PyTree]:
        """Shapes and shardings of a checkpoint of this run."""
        rest = self._expected(meta['phase_index'])._asdict()
        params = rest.pop('params')
        rest['host'] = self.source.arrays()  # NumPy, so that they are read into NumPy
        return params, rest

    def _phase(self, index: int, train: TrainState) -> Params:
        """Run one phase to its end; -> its parameters."""
        phase = self.phases[index]
        step = int(train.step[0])
        self.program = None
        size = call_size(phase.steps, self.updates_per_call)
        keys = self._phase_keys(index)
        self.source.set_params(train.params)
        pending: _Call | None = None
        self.logged_at, self.logged_step, self.calls_seen = time.monotonic(), step, 0
        self.played: dict[str, Mean] = {}
        self.monitor = faults.SkipMonitor(self.checkpoints.folder.parent, phase, self.max_streak)
        while step < phase.steps:
            updates = min(size, phase.steps - step)
            train, call = self._dispatch(index, train, keys, step, updates)
            step += updates
            if pending is not None:  # looked at while the device works on the next call
                self._look(index, pending)
            pending = call
            if self._score_due(phase, step - updates, step):
                assert self.scoring is not None
                scores = self.scoring.play(
                    train.params
                )  # before the next call takes the weights' buffers
                self._look(index, pending, scores=scores)
                pending = None
            due = time.monotonic() - self.saved_at >= self.checkpoint_every_s
            if (due or self.signals) and step < phase.steps:
                if pending is not None:
                    self._look(index, pending)
                pending = None
                self._save(index, train.params, train, step)
                self._stop_if_asked(index, step)
        if pending is not None:
            self._look(index, pending, last=True)
        params = train.params if train.ema is None else {**train.params, **train.ema}
        self.source.finish(train.live)
        if (
            train.ema is not None
        ):  # beside the mean, the weights themselves, with which the phase could go on
            train = train._replace(ema=state.trained_groups(train.params, phase))
        kept = self.checkpoints.keep_phase_ends and not self.source.plays
        self._save(index, params, train if kept else None, phase.steps)
        self._stop_if_asked(index, phase.steps)
        return params

    def _compile(
        self, index: int, train: TrainState, data: PyTree, loaded: PyTree, keys: Array, updates: int
    ) -> tuple[Program, Any]:
        """The program of a phase, compiled for such arguments (shapes will do); -> (it, what XLA
        says of it).
        """
        shardings = None if self.mesh is None else state.train_sharding(self.mesh, train)
        program = make_program(self.phases[index], self.source, self.mesh, shardings)
        return program, program.call.lower(train, data, loaded, keys, updates=updates).compile()

    def _compile_ahead(self, index: int, data: PyTree) -> None:
        """Compile a phase beside the one that trains, which leaves a processor idle now and then.

        Not on accelerators, where a compiler tries kernels out on the device that trains.
        """
        while index < len(self.phases) and self.phases[index].name in self.given:
            index += 1
        if index < len(self.phases) and self.phases[index].steps and jax.default_backend() == 'cpu':
            updates = call_size(self.phases[index].steps, self.updates_per_call)
            args = (index, self._expected(index), data, None, self._phase_keys(index), updates)
            self.ahead = self.compiler.submit(self._compile, *args)

    def _dispatch(
        self, index: int, train: TrainState, keys: Array, step: int, updates: int
    ) -> tuple[TrainState, _Call]:
        phase = self.phases[index]
        loaded = self.source.load(updates, phase.batch, phase.length, keys.shape[0], phase.relevant)
        data = self.source.data
        # The call takes the weights' buffers; the next `load`, which runs beside it, acts with a
        # copy of them.
        self.source.set_params(train.params)
        played = self.source.metrics()
        if self.mesh is not None:
            data, loaded = jax.device_put((data, loaded), state.replicated(self.mesh))
        if self.program is None:
            args = (index, train, data, loaded, keys, updates)
            (self.program, compiled), self.ahead = (
                self.ahead.result() if self.ahead else self._compile(*args),
                None,
            )
            faults.check_fits(
                phase, keys.shape[0], compiled, state.available_bytes(jax.devices()[0])
            )
            if (
                loaded is None
            ):  # else nobody knows the next phase's shapes before its first batches are there
                self._compile_ahead(index + 1, data)
        train, metrics, *rest = self.program.call(train, data, loaded, keys, updates=updates)
        return train, _Call(step + updates, updates, {**metrics, **played}, *rest)

    def _score_due(self, phase: Phase, before: int, after: int) -> bool:
        """Whether the updates between passed a multiple of `scoring.every` frames."""
        if self.scoring is None:
            return False
        passed = lambda step: self._phase_frames(phase, step) // self.scoring.every
        return passed(after) > passed(before)

    def _look(
        self,
        index: int,
        call: _Call,
        last: bool = False,
        scores: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Wait for a call; report what of it was not finite, stop if it was too much; log it if it
        is time.

        scores: [seeds] of the weights after it; always logged.
        """
        phase = self.phases[index]
        streak = np.asarray(call.streak)
        if fault := self.monitor.look(call.step - call.updates, streak, call.history, call.skipped):
            raise UserError(fault)
        if call.memory is not None:
            self.source.write_back(jax.device_get(call.memory), streak == 0)
        metrics = dict(jax.device_get(dict(call.metrics)))
        for name in [
            name for name, x in metrics.items() if isinstance(x, Mean)
        ]:  # over all calls since the last line
            self.played[name] = jax.tree.map(
                np.add, metrics.pop(name), self.played.get(name, Mean(0.0, 0.0))
            )
        now = time.monotonic()
        self.calls_seen += 1
        first = self.calls_seen == 1
        if not (first or last or scores) and now - self.logged_at < self.log_every_s:
            return
        rate = (call.step - self.logged_step) / max(now - self.logged_at, 1e-9)
        self.logged_at, self.logged_step = now, call.step
        record: dict[str, Any] = dict(
            phase=phase.name,
            step=call.step,
            gradient_steps=self._gradient_steps(index, call.step),
            env_frames=self._env_frames(index, call.step),
            seconds=self.seconds,
        )
        record |= self._values({**metrics, **(scores or {})})
        if last or not first:  # the first call of a phase spends its time compiling
            record['time/updates_per_s'] = rate
            record['time/frames_per_s'] = rate * phase.batch * phase.length * self.keys.shape[0]
            if self.source.plays:
                played = self._phase_frames(phase, call.step) - self._phase_frames(
                    phase, call.step - call.updates
                )
                record['time/env_frames_per_s'] = rate * played / call.updates * self.keys.shape[0]
        record['time/seconds'] = self.seconds
        record['time/compilations'] = len(self.program.compile_log) if self.program else 0
        for sink in self.sinks:
            sink.write(record)

    def _gradient_steps(self, index: int, step: int) -> int:
        return sum(phase.steps for phase in self.phases[:index]) + step

    def _values(self, metrics: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Metrics [seeds], and what was played since the last line, as a record's entries; NaN for
        the mean of none.
        """
        values: dict[str, Any] = {}
        for name, x in metrics.items():
            values[name] = float(x.mean())
            if x.shape[0] > 1:
                values[f'{name}/seeds'] = [float(v) for v in x]
        if 'env/return' in self.played:
            values['env/episodes'] = float(self.played['env/return'].n.sum())
        for name, (total, count) in self.played.items():
            each = [float(t / n) if n else float('nan') for t, n in zip(total, count, strict=True)]
            some = [x for x in each if not np.isnan(x)]
            values[name] = float(np.mean(some)) if some else float('nan')
            if len(each) > 1:
                values[f'{name}/seeds'] = each
        self.played = {}
        return values

    def _phase_frames(self, phase: Phase, step: int) -> int:
        """Frames that one seed has learnt from after `step` updates of a phase."""
        return self.source.env_frames(step, phase.batch, phase.length)

    def _env_frames(self, index: int, step: int) -> int:
        """The same, of this phase and those before it."""
        before = sum(self._phase_frames(phase, phase.steps) for phase in self.phases[:index])
        return before + self._phase_frames(self.phases[index], step)

    def _save(self, index: int, params: Params, train: TrainState | None, step: int) -> None:
        """Checkpoint a step; `train` may be None at the end of a phase."""
        phase = self.phases[index]
        complete = step == phase.steps
        if not state.finite((params, train and train._replace(live=()))):
            raise UserError(
                f'phase {phase.name} step {step}: weights or optimiser are not finite; nothing was saved'
            )
        rest = None
        if train is not None:
            rest = train._asdict()
            rest.pop('params')
            rest['host'] = self.source.arrays()
        meta: checkpoint.Meta = dict(
            phase=phase.name,
            phase_index=index,
            step=step,
            complete=complete,
            gradient_steps=self._gradient_steps(index, step),
            env_frames=self._env_frames(index, step),
            seconds=self.seconds,
            seeds=int(self.keys.shape[0]),
            config=self.config,
            source=self.source.get_state(),
        )
        last = bool(self.signals) or (complete and index == len(self.phases) - 1)
        self.checkpoints.save(meta['gradient_steps'], params, rest, meta, last=last)
        self.saved_at = time.monotonic()

    def _stop_if_asked(self, index: int, step: int) -> None:
        if self.signals:
            phase = self.phases[index].name
            checkpoint.warn(
                f'{self.signals[0].name}: saved at {phase}/{step}; run the same command to continue'
            )
            raise SystemExit(EXIT[self.signals[0]])
