"""What a user should know before anything heavy starts: the device, its speed, and what is
installed.
"""

import importlib.metadata
import importlib.util
import os
import platform
import time

import jax
import jax.numpy as jnp

import reverie
from reverie.evaluation.returns import device_name

# Optional packages: (module, what it is for, extra of reverie that brings it)
OPTIONAL = (
    ('gymnax', 'gymnax environments', 'gymnax'),
    ('tensorboardX', 'TensorBoard logs', 'tensorboard'),
    ('wandb', 'W&B logs', 'wandb'),
    ('imageio_ffmpeg', 'MP4 recordings of play', 'video'),
    ('minatar', 'tests against the original games', 'dev'),
)


def matmul_tflops(size: int, dtype: str) -> float:
    """Measured speed of one square matrix product, in TFLOP/s."""
    x = jnp.ones((size, size), dtype)
    run = jax.jit(lambda x: x @ x)
    run(x).block_until_ready()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        run(x).block_until_ready()
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times) / 1e12


def check() -> list[str]:
    """Lines for the terminal."""
    cpu = jax.default_backend() == 'cpu'
    size = 1024 if cpu else 8192
    lines = [
        f'reverie     {reverie.__version__}, python {platform.python_version()}',
        *(
            f'{name:<11} {importlib.metadata.version(name)}'
            for name in ('jax', 'flax', 'optax', 'grain')
        ),
        f'device      {device_name()} ({jax.device_count()} for {jax.default_backend()})',
        f'speed       {matmul_tflops(size, "float32"):.2f} TFLOP/s fp32, {matmul_tflops(size, "bfloat16"):.2f} bf16',
    ]
    if cpu:
        lines.append(
            f'cores       {os.cpu_count()}; presets: dreamer4_demo fits, dreamer4 wants a GPU'
        )
    for module, use, extra in OPTIONAL:
        found = importlib.util.find_spec(module) is not None
        lines.append(
            f'{module:<11} {"installed" if found else f"not installed: pip install reverie[{extra}]"}, for {use}'
        )
    return lines
