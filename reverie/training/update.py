"""Jitted program of a phase: many gradient steps of every seed in one call."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree

from reverie.data.source import Source
from reverie.training.state import TrainState, batch_sharding
from reverie.types import Batch, Losses, Mean, Metrics, Outcome, Params, Phase, UserError, sg


def select(ok: Array, new: PyTree, old: PyTree) -> PyTree:
    """Return `new` where `ok`, else `old`; a select and no branch, for each seed decides alone."""
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


@jax.jit
def finite(tree: PyTree) -> Bool[Array, '']:
    """Tell if every floating-point number of `tree` is finite."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return (
        jnp.all(jnp.stack([jnp.isfinite(x).all() for x in leaves])) if leaves else jnp.array(True)
    )


def global_norm(tree: PyTree) -> Float[Array, '']:
    """Return the root of the sum of squares of every leaf, in float32."""
    norm: Array = optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))
    return norm


def check_losses(phase: Phase, losses: Losses) -> None:
    """Raise UserError unless the terms are those of `phase.scales`, each [B, T] ([B, H] if
    imagined).
    """
    missing = sorted(set(phase.scales) - set(losses))
    extra = sorted(set(losses) - set(phase.scales))
    if missing or extra:
        raise UserError(
            f'phase {phase.name}: losses and scales differ; missing losses {missing}, extra {extra}'
        )
    wrong = {
        name: x.shape for name, x in losses.items() if x.ndim != 2 or x.shape[0] != phase.batch
    }
    if wrong:
        raise UserError(
            f'phase {phase.name}: every loss must have shape [B={phase.batch}, T], got {wrong}'
        )


def normalise(
    means: dict[str, Float[Array, '']],
    square: dict[str, Float[Array, '']],
    decay: float,
    applied: Int[Array, ''],
) -> tuple[dict[str, Float[Array, '']], dict[str, Float[Array, '']]]:
    """Divide each term by its RMS, L / RMS(L) (Dreamer 4, section 3.2); return (normalised terms,
    running means of squares).

    The paper leaves the start open: as in Adam, the mean is divided by 1 - decay^t, so the first
    update sees +-1. A term that has been zero so far is left as it is. applied: updates that
    entered `square` before this one.
    """
    square = {name: decay * square[name] + (1 - decay) * sg(x) ** 2 for name, x in means.items()}
    correction = 1 - decay ** (applied + 1).astype(jnp.float32)
    rms = {name: jnp.sqrt(x / correction) for name, x in square.items()}
    return {
        name: x / jnp.where(rms[name] > 1e-8, rms[name], 1.0) for name, x in means.items()
    }, square


def check_groups(phase: Phase, params: Params, groups: Params) -> None:
    """Raise UserError if a loss replaces groups that are trained, or that the agent does not have."""
    trained, unknown = sorted(set(groups) & set(phase.trains)), sorted(set(groups) - set(params))
    if trained or unknown:
        raise UserError(
            f'phase {phase.name}: the loss replaces groups it trains {trained} or does not know {unknown}'
        )


def learn(
    phase: Phase,
    state: TrainState,
    batch: Batch,
    key: PRNGKeyArray,
    fixed: Params = {},  # noqa: B006, which nothing writes to
) -> tuple[TrainState, Metrics, PyTree, Bool[Array, '']]:
    """Take one gradient step of one seed; return (state, metrics, memory for replay or None, ok).

    fixed: groups of `phase.fixed`. Where losses, gradients or updates are not finite, ok is false
    and only counters change.
    """
    trained = phase.trained(state.params)

    def objective(trained: Params) -> Any:
        params = {**state.params, **trained, **fixed}
        outcome = Outcome(*phase.loss(params, batch, key, state.step))
        check_losses(phase, outcome.losses)
        check_groups(phase, state.params, outcome.groups or {})
        means = {name: x.astype(jnp.float32).mean() for name, x in outcome.losses.items()}
        terms, rms = means, state.rms
        if phase.rms_decay is not None:
            terms, rms = normalise(means, state.rms, phase.rms_decay, state.step - state.skipped)
        return sum(phase.scales[name] * x for name, x in terms.items()), (means, outcome, rms)

    (total, (means, outcome, rms)), grads = jax.value_and_grad(objective, has_aux=True)(trained)
    updates, opt_state = phase.optimiser.update(grads, state.opt_state, trained)
    grad_norm, update_norm = global_norm(grads), global_norm(updates)
    # Every mean is checked, not just their sum: a term of scale 0 that is NaN is a fault too.
    ok = jnp.isfinite(jnp.stack([total, grad_norm, update_norm, *means.values()])).all() & finite(
        outcome.groups
    )
    trained = optax.apply_updates(trained, updates)
    ema = state.ema
    decay = phase.ema_decay
    if ema is not None and decay is not None:
        # In float32 accumulation the mean starts at the weights themselves, so it needs no bias
        # correction.
        ema = jax.tree.map(lambda m, x: m + (1 - decay) * (x - m), ema, trained)
    params = {**state.params, **trained, **sg(outcome.groups or {})}
    if phase.after is not None:
        params = phase.after(params, state.step)
    old = (state.params, state.opt_state, state.rms, state.ema)
    params, opt_state, rms, ema = select(ok, (params, opt_state, rms, ema), old)
    state = state._replace(
        params=params,
        opt_state=opt_state,
        rms=rms,
        ema=ema,
        step=state.step + 1,
        skipped=state.skipped + ~ok,
        streak=jnp.where(ok, 0, state.streak + 1),
    )
    metrics: Metrics = {name: jnp.asarray(x, jnp.float32) for name, x in outcome.metrics.items()}
    losses = {f'loss/{name}': x for name, x in means.items()}
    metrics = {**metrics, **losses, 'opt/grad_norm': grad_norm, 'opt/update_norm': update_norm}
    return state, metrics, sg(outcome.memory), ok


class SkippedUpdate(NamedTuple):
    """Inputs of the first skipped update of a call, for one seed."""

    update: Int[Array, '']  # of the phase, from 0; -1 if none was skipped
    key: Array  # key data of the loss
    batches: tuple[Batch, ...]  # the update's; where windows have two lengths, the other's is blank


def update(
    phase: Phase, state: TrainState, batch: Batch, key: PRNGKeyArray
) -> tuple[TrainState, Metrics]:
    """Take one gradient step of one seed by `learn`; return (state, metrics)."""
    return learn(phase, state, batch, key, phase.fixed())[:2]


@dataclasses.dataclass(frozen=True)
class Program:
    """Compiled updates of a phase.

    `call(state, data, loaded, keys [seeds], fixed, long [updates], updates)` donates state; `loaded`
    is a pair and `long` tells which updates take the second where windows have two lengths. Returns: state; metrics
    {name: [seeds]}; streak [seeds, updates]; history {name: [seeds, updates]} of losses and norms;
    memory [seeds, updates, B, T, ...] for a replay on the host, else None; the `SkippedUpdate`
    [seeds, ...] of the call.
    """

    call: Any  # a jitted function
    compile_log: list[int]  # one entry per compilation: the number of updates of a call


def finite_mean(x: Float[Array, ' updates']) -> Float[Array, '']:
    """Return the mean of the finite entries; NaN if there are none."""
    finite = jnp.isfinite(x)
    return jnp.where(finite, x, 0).sum() / finite.sum()


def over_updates(metrics: Metrics) -> Metrics:
    """Average each metric [updates] of a call over the updates where it is finite; add up `Mean`s."""
    return {
        name: jax.tree.map(lambda x: x.sum(0), x) if isinstance(x, Mean) else finite_mean(x)
        for name, x in metrics.items()
    }


def make_program(
    phase: Phase, source: Source, mesh: Mesh | None = None, shardings: PyTree = None
) -> Program:
    """Make the program of `phase`, in which sampling (play included, if it is on the device) and
    learning are one.

    `source.data` is an argument of it: a constant would be folded into the executable.
    """
    compile_log: list[int] = []
    sorts = (phase,) if phase.long is None else (phase, phase.longer)
    rows = [None if mesh is None else batch_sharding(mesh, sort.batch) for sort in sorts]

    @functools.partial(jax.jit, inline=True, static_argnames='sort')  # its shapes cost no tracing
    def draw(
        state: TrainState, data: PyTree, loaded: PyTree, key: PRNGKeyArray, sort: int
    ) -> tuple[TrainState, Batch, Metrics]:
        its = sorts[sort]
        live, batch, played = source.sample(
            state.live, state.params, data, loaded, key, its.batch, its.length, its.relevant
        )
        return state._replace(live=live), batch, played

    def one_seed(
        state: TrainState, data: PyTree, loaded: PyTree, key: PRNGKeyArray, fixed: Params,
        long: Array | None, updates: int,
    ) -> Any:  # fmt: skip
        def step(sort: int, carry: Any, loaded: PyTree) -> Any:
            state, skipped = carry
            sample_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
            state, batch, played = draw(state, data, loaded[sort], sample_key, sort)
            if rows[sort] is not None:
                where = rows[sort]
                batch = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, where), batch)
            batches = tuple(batch if i == sort else b for i, b in enumerate(blank))
            given = SkippedUpdate(state.step, jax.random.key_data(loss_key), batches)
            state, metrics, memory, ok = learn(sorts[sort], state, batch, loss_key, fixed)
            skipped = select(ok | (skipped.update >= 0), skipped, given)
            if memory is not None:
                live, memory = source.write_memory(state.live, memory, ok)
                state = state._replace(live=live)
            return (state, skipped), ({**metrics, **played}, state.streak, memory)

        def body(carry: Any, given: tuple[PyTree, Array | None]) -> Any:
            loaded, long = given
            if long is None:
                return step(0, carry, loaded)
            either = [functools.partial(step, sort) for sort in (1, 0)]
            return jax.lax.cond(long, *either, carry, loaded)

        first = jax.tree.map(lambda x: x[0], loaded)
        like = [
            jax.eval_shape(functools.partial(draw, sort=i), state, data, first[i], key)[1]
            for i in range(len(sorts))
        ]
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tuple(like))
        none = SkippedUpdate(jnp.int32(-1), jnp.zeros_like(jax.random.key_data(key)), blank)
        (state, skipped), (metrics, streak, memory) = jax.lax.scan(
            body, (state, none), (loaded, long), length=updates
        )
        history = {name: x for name, x in metrics.items() if name.startswith(('loss/', 'opt/'))}
        metrics = {**over_updates(metrics), 'opt/skipped': state.skipped.astype(jnp.float32)}
        return state, metrics, streak, history, memory, skipped

    def call(
        state: TrainState,
        data: PyTree,
        loaded: PyTree,
        keys: Key[Array, ' seeds'],
        fixed: Params | None = None,
        long: Bool[Array, ' updates'] | None = None,
        *,
        updates: int,
    ) -> Any:
        compile_log.append(updates)
        fixed = fixed or {}
        loaded = loaded if len(sorts) > 1 else (loaded,)
        if keys.shape[0] == 1:
            # vmap over one seed turns matmuls and convolutions into batched ones, for nothing.
            alone = jax.tree.map(lambda x: x[0], state)
            loaded = jax.tree.map(lambda x: x[:, 0], loaded)
            results = one_seed(
                alone, source.of_seed(data, 0), loaded, keys[0], fixed, long, updates
            )
            return jax.tree.map(lambda x: x[None], results)

        def each(state: TrainState, loaded: PyTree, key: PRNGKeyArray, seed: Array) -> Any:
            return one_seed(state, source.of_seed(data, seed), loaded, key, fixed, long, updates)

        seeds = jnp.arange(keys.shape[0])
        return jax.vmap(each, in_axes=(0, 1, 0, 0))(state, loaded, keys, seeds)

    out = None if shardings is None else (shardings, None, None, None, None, None)
    return Program(
        jax.jit(call, static_argnames='updates', donate_argnums=0, out_shardings=out), compile_log
    )
