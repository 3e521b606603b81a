"""Cost of a frame, counted in the program before it is compiled."""

import math
from collections.abc import Callable
from typing import Any


def flops(jaxpr: Any, branch: Callable[..., float] = max) -> float:
    """Floating-point operations of the matrix products and convolutions in a jaxpr; scans count in
    full.

    branch: which branch of a condition counts, `max` or `min`.
    """
    return sum((_of(eqn, branch) for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns), 0.0)


def _of(eqn: Any, branch: Callable[..., float]) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == 'dot_general':
        (contracted, _), _ = params['dimension_numbers']
        inner = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        products: float = 2.0 * eqn.outvars[0].aval.size * inner
        return products
    if name == 'conv_general_dilated':
        kernel = eqn.invars[1].aval
        outputs = kernel.shape[params['dimension_numbers'].rhs_spec[0]]
        products = 2.0 * eqn.outvars[0].aval.size * kernel.size / outputs
        return products
    if name == 'cond':
        return branch(flops(b, branch) for b in params['branches'])
    times = params['length'] if name == 'scan' else 1
    has_eqns: Callable[[Any], bool] = lambda p: (
        hasattr(p, 'eqns') or hasattr(getattr(p, 'jaxpr', None), 'eqns')
    )
    return times * sum((flops(p, branch) for p in params.values() if has_eqns(p)), 0.0)
