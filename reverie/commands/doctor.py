"""`reverie doctor`: the device, its speed, and what is installed."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import time

from reverie.commands.terminal import say

# Optional packages: (module, what it is for, extra of reverie that brings it)
OPTIONAL = (
    ('gymnax', 'gymnax environments', 'gymnax'),
    ('tensorboardX', 'TensorBoard logs', 'tensorboard'),
    ('wandb', 'W&B logs', 'wandb'),
    ('imageio_ffmpeg', 'MP4 recordings of play', 'video'),
    ('av', 'import of videos', 'video'),
    ('h5py', 'import of Minari', 'minari'),
    ('minatar', 'tests against the original games', 'dev'),
)


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Say which device is used and how fast it is, and what is installed."""


def run(args: Doctor) -> None:
    """Print the lines of `check`."""
    for line in check():
        say(line)


def matmul_tflops(size: int, dtype: str) -> float:
    """Measured speed of one square matrix product, in TFLOP/s."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((size, size), dtype)
    square = jax.jit(lambda x: x @ x)
    square(x).block_until_ready()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        square(x).block_until_ready()
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times) / 1e12


def check() -> list[str]:
    """Versions, device, speed and optional packages, a line each."""
    import jax

    import reverie
    from reverie.evaluation.results import device_name

    cpu = jax.default_backend() == 'cpu'
    size = 1024 if cpu else 8192
    speeds = [f'{matmul_tflops(size, t):.2f}' for t in ('float32', 'bfloat16')]
    names = ('jax', 'flax', 'optax', 'grain')
    lines = [
        f'reverie     {reverie.__version__}, python {platform.python_version()}',
        *(f'{name:<11} {importlib.metadata.version(name)}' for name in names),
        f'device      {device_name()} ({jax.device_count()} for {jax.default_backend()})',
        f'speed       {speeds[0]} TFLOP/s fp32, {speeds[1]} bf16',
    ]
    if cpu:
        fits = 'presets: dreamer4_demo fits, dreamer4 wants a GPU'
        lines.append(f'cores       {os.cpu_count()}; {fits}')
    for module, use, extra in OPTIONAL:
        found = importlib.util.find_spec(module) is not None
        state = 'installed' if found else f'not installed: pip install reverie[{extra}]'
        lines.append(f'{module:<11} {state}, for {use}')
    return lines
