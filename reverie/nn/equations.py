"""Functions as lists of equations (jaxprs), to be taken apart by what depends on what.

A variable is what one equation puts out; a literal is a number written into an equation.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var
from jaxtyping import PyTree

Atom = Any  # a Var or a Literal
Values = dict[Var, Any]
CALLS = {'pjit': 'jaxpr', 'jit': 'jaxpr', 'closed_call': 'call_jaxpr'}


class Traced(NamedTuple):
    """Function as equations, in which every called function is written out."""

    equations: list[JaxprEqn]
    inputs: list[Var]
    outputs: list[Atom]
    constants: Values
    """Arrays that the function closes over."""


def trace(f: Callable[..., PyTree], *like: PyTree) -> tuple[Traced, Any]:
    """Trace `f`; return its equations and the shapes of its result.

    like: arguments, as arrays or shapes; inputs and outputs are their leaves in order.
    """
    closed, shape = jax.make_jaxpr(f, return_shape=True)(*like)
    equations: list[JaxprEqn] = []
    constants: Values = {}

    def write_out(called: ClosedJaxpr, arguments: Sequence[Atom]) -> list[Atom]:
        jaxpr = called.jaxpr
        held = {v: Var(v.aval) for v in jaxpr.constvars}
        constants.update(zip(held.values(), called.consts, strict=True))
        names: dict[Var, Atom] = {**held, **dict(zip(jaxpr.invars, arguments, strict=True))}
        for eqn in jaxpr.eqns:
            inputs = [known(v, names) for v in eqn.invars]
            inner = eqn.params.get(CALLS.get(eqn.primitive.name, ''))
            if inner is None:
                outputs: list[Atom] = [Var(v.aval) for v in eqn.outvars]
                equations.append(eqn.replace(invars=inputs, outvars=outputs))
            else:
                outputs = write_out(inner, inputs)
            names.update(zip(eqn.outvars, outputs, strict=True))
        return [known(v, names) for v in jaxpr.outvars]

    inputs = [Var(v.aval) for v in closed.jaxpr.invars]
    outputs = write_out(closed, inputs)
    return Traced(equations, inputs, outputs, constants), shape


def variables(atoms: Iterable[Atom]) -> list[Var]:
    """Leave out literals."""
    return [v for v in atoms if isinstance(v, Var)]


def makers(equations: Iterable[JaxprEqn]) -> dict[Var, JaxprEqn]:
    """Map each variable to the equation that makes it."""
    return {v: eqn for eqn in equations for v in eqn.outvars}


def known(atom: Atom, names: Mapping[Var, Atom]) -> Atom:
    """Look up what a variable is called here; a literal is itself."""
    return atom if isinstance(atom, Literal) else names[atom]


def value(atom: Atom, values: Mapping[Var, Any]) -> Any:
    """Look up a variable's value, or read a literal's."""
    return atom.val if isinstance(atom, Literal) else values[atom]


def evaluate(equations: Iterable[JaxprEqn], values: Mapping[Var, Any]) -> Values:
    """Run equations in order; return `values` with those of all variables they make."""
    values = dict(values)
    for eqn in equations:
        inputs = [value(v, values) for v in eqn.invars]
        with eqn.ctx.manager:
            made = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
        outputs = made if eqn.primitive.multiple_results else [made]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return values


def ranks(equations: Iterable[JaxprEqn], rank: Mapping[Var, int]) -> dict[Var, int]:
    """Give each variable the highest rank of all that it depends on; 0 if it depends on nothing."""
    rank = dict(rank)
    for eqn in equations:
        highest = max((rank.get(v, 0) for v in variables(eqn.invars)), default=0)
        rank.update(dict.fromkeys(eqn.outvars, highest))
    return rank


def of_rank(equations: Iterable[JaxprEqn], rank: Mapping[Var, int], wanted: int) -> list[JaxprEqn]:
    """Choose the equations whose results are of a rank."""
    return [eqn for eqn in equations if rank[eqn.outvars[0]] == wanted]


def needed(
    wanted: Iterable[Atom], maker: Mapping[Var, JaxprEqn], stop: Callable[[Var], bool]
) -> tuple[set[int], list[Var]]:
    """Find what `wanted` is made of: ids of equations, and the variables that come from elsewhere.

    stop: variables that are not traced further. They, and those that no equation of `maker` makes,
    come from elsewhere.
    """
    todo, seen = variables(wanted), set[Var]()
    equations, given = set[int](), []
    while todo:
        v = todo.pop()
        if v in seen:
            continue
        seen.add(v)
        if v not in maker or stop(v):
            given.append(v)
        else:
            equations.add(id(maker[v]))
            todo += variables(maker[v].invars)
    return equations, given


def nbytes(atoms: Collection[Atom]) -> int:
    """Bytes of all arrays together; abstract ones without a size, as keys, count as nothing."""
    avals = [v.aval for v in atoms]
    return sum(int(np.prod(x.shape)) * getattr(x.dtype, 'itemsize', 0) for x in avals)
