"""Optimisers of the Dreamers as optax transformations: LaProp with adaptive clipping, TensorFlow's
Adam, and one optimiser per parameter group.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from reverie.types import Params, UserError


def clip_by_tensor_norm(clip: float = 0.3, floor: float = 1e-3) -> optax.GradientTransformation:
    """Clip each gradient tensor to |g| <= clip max(floor, |w|); arXiv 2102.06171, per tensor
    instead of per unit.

    The floor lets tensors that start at zero move.
    """

    def one(update: Array, param: Array) -> Array:
        bound = clip * jnp.maximum(floor, jnp.linalg.norm(param.reshape(-1)))
        return update / jnp.maximum(1.0, jnp.linalg.norm(update.reshape(-1)) / bound)

    return optax.stateless(lambda updates, params: jax.tree.map(one, updates, params))


class Moment(NamedTuple):
    """Running mean of a power of the updates, and the number of updates in it."""

    updates: Int[Array, '']
    mean: PyTree[Array]


def _running(
    decay: float, power: int, use: Callable[[Array, Array], Array]
) -> optax.GradientTransformation:
    """Keep the bias-corrected running mean of updates^power; map (update, mean) to the new update."""

    def init(params: PyTree) -> Moment:
        return Moment(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: PyTree, state: Moment, params: PyTree | None = None
    ) -> tuple[PyTree, Moment]:
        count = optax.safe_increment(state.updates)
        mean = jax.tree.map(lambda m, u: decay * m + (1 - decay) * u**power, state.mean, updates)
        correction = 1 - decay ** count.astype(jnp.float32)
        return jax.tree.map(lambda u, m: use(u, m / correction), updates, mean), Moment(count, mean)

    return optax.GradientTransformation(init, update)


def scale_by_rms(decay: float = 0.999, eps: float = 1e-20) -> optax.GradientTransformation:
    """Divide updates u by sqrt(mean of u^2) + eps, bias-corrected."""
    return _running(decay, 2, lambda u, mean: u / (jnp.sqrt(mean) + eps))


def scale_by_momentum(decay: float = 0.9) -> optax.GradientTransformation:
    """Replace updates by their running mean, bias-corrected."""
    return _running(decay, 1, lambda u, mean: mean)


def laprop_agc(
    learning_rate: float = 4e-5,
    warmup_steps: int = 1000,
    clip: float = 0.3,
    clip_floor: float = 1e-3,
    rms_decay: float = 0.999,
    momentum: float = 0.9,
    eps: float = 1e-20,
) -> optax.GradientTransformation:
    """Optimiser of Dreamer V3: adaptive clipping, then LaProp (arXiv 2002.04839), which normalises
    before it averages.

    The rate rises linearly from 0 at the first update to `learning_rate` at update `warmup_steps`.
    """
    rate: float | optax.Schedule = learning_rate
    if warmup_steps:
        rate = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.chain(
        clip_by_tensor_norm(clip, clip_floor),
        scale_by_rms(rms_decay, eps),
        scale_by_momentum(momentum),
        optax.scale_by_learning_rate(rate),
    )


def scale_by_tf_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-7
) -> optax.GradientTransformation:
    """Adam with eps beside the uncorrected root, as TensorFlow has it ("epsilon hat" of arXiv
    1412.6980 section 2).

    At update t it acts like optax's eps / sqrt(1 - b2^t), thirty times as much at the first.
    """

    def init(params: PyTree) -> optax.ScaleByAdamState:
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(
        updates: PyTree, state: optax.ScaleByAdamState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        count = optax.safe_increment(state.count)
        t = count.astype(jnp.float32)
        mu = jax.tree.map(lambda m, u: b1 * m + (1 - b1) * u, state.mu, updates)
        nu = jax.tree.map(lambda v, u: b2 * v + (1 - b2) * u * u, state.nu, updates)
        rate = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        updates = jax.tree.map(lambda m, v: rate * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def clipped_adam(
    learning_rate: float, clip_norm: float = 100.0, eps: float = 1e-7, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Optimiser of PlaNet, Dreamer V1 and V2: clip by the global norm, then TensorFlow's Adam.

    weight_decay: V2's; weights are multiplied by 1 - weight_decay before Adam's step, whatever the
    rate.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        scale_by_tf_adam(eps=eps),
        optax.scale_by_learning_rate(learning_rate),
        optax.add_decayed_weights(-weight_decay) if weight_decay else optax.identity(),
    )


def per_group(
    transforms: Mapping[str | tuple[str, ...], optax.GradientTransformation],
) -> optax.GradientTransformation:
    """Give each top-level parameter group, or tuple of groups, an optimiser with a global norm of
    its own.

    Raises UserError if a trained group has no optimiser, or two.
    """
    owners = {(k,) if isinstance(k, str) else k: t for k, t in transforms.items()}
    names = [name for groups in owners for name in groups]
    if len(set(names)) != len(names):
        raise UserError(f'per_group: each group needs one optimiser, got {sorted(names)}')

    def split(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
        if set(tree) != set(names):
            raise UserError(
                f'per_group: optimisers are for groups {sorted(names)}, parameters have {sorted(tree)}'
            )
        return [{name: tree[name] for name in groups} for groups in owners]

    def init(params: Params) -> tuple[PyTree, ...]:
        return tuple(t.init(part) for t, part in zip(owners.values(), split(params), strict=True))

    def update(
        updates: Params, state: tuple[PyTree, ...], params: Params
    ) -> tuple[Params, tuple[PyTree, ...]]:
        parts = zip(owners.values(), split(updates), state, split(params), strict=True)
        done: list[tuple[Any, PyTree]] = [t.update(part, s, p) for t, part, s, p in parts]
        merged = {name: u for part, _ in done for name, u in part.items()}
        return {name: merged[name] for name in updates}, tuple(s for _, s in done)

    return optax.GradientTransformation(init, update)


def hidden_matrices(params: Params) -> Params:
    """Mark the weights that Muon orthogonalises, the matrices inside transformer layers.

    Embeddings, output layers and vectors are left to Adam.
    """

    def mark(path: tuple[Any, ...], _: Any) -> optax.contrib.MuonDimensionNumbers | None:
        names = {getattr(entry, 'key', None) for entry in path}
        return optax.contrib.MuonDimensionNumbers() if {'layers', 'kernel'} <= names else None

    marked: Params = jax.tree_util.tree_map_with_path(mark, params)
    return marked


def muon_or_adamw(
    *,
    steps: int,
    learning_rate: float,
    warmup_steps: int,
    decay: float,
    weight_decay: float,
    clip_norm: float,
    muon: bool,
) -> optax.GradientTransformation:
    """Gradient clipping, then Muon or AdamW: warm-up, constant rate, linear fall to zero.

    decay: share of the `steps`, at the end, over which the rate falls.
    """
    falling = round(decay * steps)
    first = learning_rate / max(warmup_steps, 1)
    rise = optax.linear_schedule(first, learning_rate, warmup_steps)
    fall = optax.linear_schedule(learning_rate, 0.0, max(falling, 1))
    rate = optax.join_schedules([rise, fall], [max(steps - falling, warmup_steps)])
    if muon:
        method = optax.contrib.muon(
            rate,
            weight_decay=weight_decay,
            adam_b2=0.99,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=hidden_matrices,
        )
    else:
        method = optax.adamw(rate, b2=0.99, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip_norm), method)
