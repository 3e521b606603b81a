"""Networks of an agent as one value: modules by name, and heads that return distributions."""

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from reverie.nn.core import MLP, Params, Style, build, cast_kernels


class Bound:
    """Modules with weights as attributes, each bound at its first use.

    An agent's subclass names its modules and their types. `params` may lack groups that are not
    used. It belongs inside a traced function, see `nn.core.build`.
    """

    def __init__(self, bind: Mapping[str, Callable[[Params], Any]], params: Params):
        self.bind = bind
        self.params = params

    def __getattr__(self, name: str) -> Any:
        if name not in self.bind or name not in self.params:
            raise AttributeError(f'no weights of {name!r}; there are {", ".join(self.params)}')
        module = self.bind[name](self.params[name])
        self.__dict__[name] = module
        return module


Net = TypeVar('Net', bound=Bound)


class Networks(Generic[Net]):
    """Modules of an agent by name, without weights; `networks(params)` binds weights to them.

    kind: class of the bound networks.
    make: rngs -> {name: module}.
    shared: {name: module's name} of further weights of the same module, e.g. a slow critic.
    """

    def __init__(
        self,
        kind: type[Net],
        make: Callable[[nnx.Rngs], dict[str, nnx.Module]],
        shared: Mapping[str, str] | None = None,
    ):
        self.kind = kind
        self.make = make
        # Shapes are enough for binding, and save seconds at every start.
        self.outlines: dict[str, Any] = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
        self.bind = {name: build(module)[1] for name, module in self.outlines.items()}
        self.bind |= {name: self.bind[module] for name, module in (shared or {}).items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the modules, without the shared ones."""
        return tuple(self.outlines)

    def init(self, rngs: nnx.Rngs) -> Params:
        """Draw weights {name: nested dict} of every module, without the shared ones."""
        return {name: build(module)[0] for name, module in self.make(rngs).items()}

    def __call__(self, params: Params) -> Net:
        return self.kind(self.bind, params)

    def for_inference(self, params: Params) -> Params:
        """Apply `cast_kernels` to each module in `params`; leave out other groups."""
        return {
            name: cast_kernels(module, params[name])
            for name, module in self.outlines.items()
            if name in params
        }

    def loss(self, function: Callable[..., Any], cfg: Any) -> Callable[..., Any]:
        """Turn a loss (net, batch, key, cfg, step) into the form of `Phase.loss`."""
        return lambda params, batch, key, step: function(self(params), batch, key, cfg, step)


class Head(MLP):
    """MLP whose outputs are the parameters of a distribution: feat [*B, F] -> distribution [*B].

    dist: outputs [*B, O] -> distribution.
    """

    def __init__(
        self,
        dist: Callable[[Array], Any],
        inputs: int,
        units: int,
        layers: int,
        outputs: int,
        *,
        out_scale: float = 1.0,
        style: Style,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            inputs, units, layers, outputs, out_scale=out_scale, style=style, rngs=rngs
        )
        self.dist = dist

    def __call__(self, feat: Float[Array, '*B F']) -> Any:
        return self.dist(super().__call__(feat))


class MultiTokenHead(nnx.Module):
    """MLP with an output layer for each of `ahead + 1` steps; Dreamer 4 eq. 9.

    head(feat [*B, F]) is the distribution of the present step, [*B]; head.all_steps(feat) has a
    leading axis of ahead + 1 steps. dist: outputs [*B, O] -> distribution.
    """

    def __init__(
        self,
        dist: Callable[[Array], Any],
        inputs: int,
        units: int,
        layers: int,
        outputs: int,
        ahead: int = 0,
        *,
        out_scale: float = 1.0,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.mlp = MLP(
            inputs,
            units,
            layers,
            outputs * (ahead + 1),
            out_scale=out_scale,
            dtype=dtype,
            rngs=rngs,
        )
        self.ahead = ahead
        self.dist = dist

    def _outputs(self, feat: Float[Array, '*B F']) -> Float[Array, 'n *B O']:
        out = self.mlp(feat)
        return jnp.moveaxis(out.reshape(*out.shape[:-1], self.ahead + 1, -1), -2, 0)

    def __call__(self, feat: Float[Array, '*B F']) -> Any:
        return self.dist(self._outputs(feat)[0])

    def all_steps(self, feat: Float[Array, '*B F']) -> Any:
        """Distributions [ahead + 1, *B] of the present step and the next ones."""
        return self.dist(self._outputs(feat))


def constant(net: Net) -> Net:
    """Bind the networks of `net` to weights that pass no gradient."""
    return type(net)(net.bind, jax.lax.stop_gradient(net.params))


def copy(params: Params) -> Params:
    """Copy weights into buffers of their own."""
    copied: Params = jax.tree.map(jnp.copy, params)
    return copied
