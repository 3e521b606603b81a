"""Train state: the arrays that pass from update to update, and their layout over devices."""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from reverie.types import Params, Phase, UserError

CGROUP = pathlib.Path('/sys/fs/cgroup')


class TrainState(NamedTuple):
    """State of one phase of training; a run gives every leaf a leading [seeds] axis."""

    params: Params  # every group, trained or not
    opt_state: PyTree  # of the trained groups only
    # Running mean of the square of each loss, before bias correction.
    rms: dict[str, Float[Array, '']]
    ema: Params | None  # running mean of the trained groups' weights
    step: Int[Array, '']  # updates of this phase, skipped ones included
    skipped: Int[Array, '']  # updates of this phase left out because something was not finite
    streak: Int[Array, '']  # skipped updates in a row up to now
    live: PyTree = ()  # of the source: environments and replay on the device


def create(params: Params, phase: Phase) -> TrainState:
    """Return the state at the start of `phase`, for one seed.

    Raises UserError if the phase trains an unknown group.
    """
    trained = phase.trained(params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        params=params,
        opt_state=phase.optimiser.init(trained),
        rms={name: jnp.zeros((), jnp.float32) for name in phase.scales}
        if phase.rms_decay is not None
        else {},
        ema=trained if phase.ema_decay is not None else None,
        step=zero,
        skipped=zero,
        streak=zero,
    )


def swap_mean(train: TrainState, phase: Phase) -> TrainState:
    """Exchange the trained weights and their running mean, which a phase leaves behind as its
    weights; its own inverse.
    """
    if train.ema is None:
        return train
    weights = phase.trained(train.params)
    return train._replace(params={**train.params, **train.ema}, ema=weights)


def own_buffers(tree: PyTree) -> PyTree:
    """Copy a tree so that no two leaves share a buffer, which can be donated only once; works in
    jit too.
    """
    return jax.tree.map(jnp.copy, tree)


def make_mesh(data: int = 1, fsdp: int = 1, devices: list[Any] | None = None) -> Mesh:
    """Make the mesh of a run, axes (data, fsdp); raise UserError if there are too few devices.

    Axis types are pinned to Auto: with JAX's default (Explicit), ordinary data-parallel gradients
    are ambiguous.
    """
    devices = jax.devices() if devices is None else devices
    if data * fsdp > len(devices):
        raise UserError(
            f'mesh data={data} x fsdp={fsdp} needs {data * fsdp} devices, but there are {len(devices)}'
        )
    return jax.make_mesh(
        (data, fsdp),
        ('data', 'fsdp'),
        axis_types=(AxisType.Auto,) * 2,
        devices=devices[: data * fsdp],
    )


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Spread rows over every device; raise UserError if `rows` does not divide."""
    if rows % mesh.size:
        raise UserError(
            f'a batch of {rows} rows does not divide over the mesh {dict(mesh.shape)} of {mesh.size}'
        )
    return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that are the same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def param_sharding(mesh: Mesh, tree: PyTree, leading: int = 1) -> PyTree:
    """Split each leaf over `fsdp` along its largest divisible axis after `leading` whole axes.

    One rule for parameters, optimiser state and weight means alike, so no module carries
    annotations.
    """
    ways = mesh.shape['fsdp']

    def rule(x: Array) -> NamedSharding:
        axes = [i for i in range(leading, x.ndim) if x.shape[i] % ways == 0]
        if ways == 1 or not axes:
            return replicated(mesh)
        axis = max(axes, key=lambda i: x.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, 'fsdp'))

    return jax.tree.map(rule, tree)


def train_sharding(mesh: Mesh, train: TrainState) -> TrainState:
    """Return `param_sharding` of a train state, with `live` the same on every device."""
    rest: TrainState = param_sharding(mesh, train._replace(live=()))
    return rest._replace(live=jax.tree.map(lambda x: replicated(mesh), train.live))


def available_bytes(device: jax.Device | None = None) -> int | None:
    """Return the memory left on an accelerator, or on the host (None, or a CPU device); None if it
    is not known.
    """
    if device is not None and device.platform != 'cpu':
        stats = device.memory_stats() or {}
        return (
            stats['bytes_limit'] - stats.get('bytes_in_use', 0) if 'bytes_limit' in stats else None
        )
    free = []
    meminfo = pathlib.Path('/proc/meminfo')
    if meminfo.exists():
        free += [
            int(line.split()[1]) << 10
            for line in meminfo.read_text().splitlines()
            if 'MemAvailable' in line
        ]
    limit, used, parts = (CGROUP / f'memory.{name}' for name in ('max', 'current', 'stat'))
    if (
        limit.exists() and used.exists() and limit.read_text().strip().isdigit()
    ):  # a container's own limit
        cached = [
            int(line.split()[1])
            for line in parts.read_text().splitlines()
            if line.startswith('inactive_file ')
        ]
        free.append(
            int(limit.read_text()) - int(used.read_text()) + sum(cached)
        )  # the cache of files is given up
    return min(free, default=None)
