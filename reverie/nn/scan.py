"""`lean_scan`: `jax.lax.scan` of a recurrent step, with no more in the loop than the state needs.

A recurrent step is many small operations, and an accelerator spends its time on starting them. The
step is taken apart by what each operation depends on:

| an operation depends on             | it runs                                                        |
|-------------------------------------|----------------------------------------------------------------|
| closed-over arrays alone            | once, before the loop: casts and slices of weights             |
| the step's inputs, not the state    | for all steps at once, before it: random numbers               |
| the state, and the state needs it   | in the loop                                                    |
| the state, but only outputs need it | for all steps at once, after it: heads                         |

The backward pass keeps the states and nothing else. What a step's backward pass reads is computed
for all steps at once from them; the backward loop carries the state's gradient alone; gradients of
weights and inputs then follow from one backward pass over all steps at once, not from sums within
the loop. It may round otherwise than `jax.lax.scan`, as rematerialisation does.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Var
from jaxtyping import Array, Float, PyTree

from reverie.nn.equations import (
    Atom,
    Traced,
    Values,
    evaluate,
    makers,
    nbytes,
    needed,
    of_rank,
    ranks,
    trace,
    value,
    variables,
)

# What a variable depends on: nothing but closed-over arrays; also the step's inputs; the state too.
FIXED, INPUT, STATE = range(3)
# Steps in a trip of the backward loop, which writes their outputs with one copy. Forward too, a
# Dreamer V3 would start 5% less and take a tenth more memory.
UNROLL = 2
# Cheaper to do again than to read, where the result is larger.
COPIES = {
    'broadcast_in_dim', 'concatenate', 'convert_element_type', 'iota', 'reshape', 'slice',
    'squeeze', 'transpose',
}  # fmt: skip


def lean_scan(
    step: Callable[[Any, Any], tuple[Any, Any]], state: PyTree[Array], xs: PyTree[Array]
) -> tuple[PyTree[Array], PyTree[Array]]:
    """Compute `jax.lax.scan(step, state, xs)`; return (last state, outputs [T, ...]).

    step: has no side effects; may close over weights, which get their gradients. Gradients are for
    the reverse mode, and not twice. Raises TypeError for a step that changes a shape or type of the
    state.
    """
    begin, state_tree = jax.tree.flatten(state)
    rows = jax.tree.leaves(xs)
    length = len(rows[0])
    like = jax.tree.map(lambda x: jax.eval_shape(lambda x: x[0], x), xs)
    traced, (new_shape, y_shape) = trace(step, state, like)
    for old, new in zip(begin, jax.tree.leaves(new_shape), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            was, now = (f'{x.dtype}{list(x.shape)}' for x in (old, new))
            raise TypeError(f'lean_scan: a step makes {now} of a state {was}')
    plan = split(traced, len(begin))

    fixed = evaluate(plan.once, traced.constants)
    stacked: Values = dict(zip(plan.rows, rows, strict=True))
    stacked |= of_all_steps(plan.before, plan.ahead, fixed, stacked)

    def body(weights: list[Any], state: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        names = (*plan.weights, *plan.state, *plan.inputs)
        values = evaluate(plan.loop, dict(zip(names, (*weights, *state, *xs), strict=True)))
        new = [jnp.asarray(value(v, values), x.dtype) for v, x in zip(plan.new, state, strict=True)]
        return new, [values[v] for v in plan.crossing]

    weights, inputs = [fixed[v] for v in plan.weights], [stacked[v] for v in plan.inputs]
    last, states, crossed = loop(body, plan.asked, length, weights, begin, inputs)
    stacked |= zip(plan.crossing, crossed, strict=True)
    stacked |= {plan.new[i]: x for i, x in zip(plan.asked, states, strict=True)}
    stacked |= of_all_steps(plan.after, plan.late, fixed, stacked)

    def output(atom: Atom) -> Array:
        if isinstance(atom, Var) and atom in stacked:
            row: Array = stacked[atom]
            return row
        x = jnp.asarray(value(atom, fixed))
        return jnp.broadcast_to(x, (length, *x.shape))

    ys = jax.tree.unflatten(jax.tree.structure(y_shape), map(output, plan.outputs))
    return jax.tree.unflatten(state_tree, last), ys


def discounted(
    a: Float[Array, 'H *N'], b: Float[Array, 'H *N'], last: Float[Array, '*N']
) -> Float[Array, 'H *N']:
    """R_t = a_t + b_t R_{t+1}, R_H = last, in ln H rounds over all t, where a loop would take H."""

    def join(later: tuple[Array, Array], t: tuple[Array, Array]) -> tuple[Array, Array]:
        return t[0] + t[1] * later[0], t[1] * later[1]

    a, b = jax.lax.associative_scan(join, (a, b), reverse=True)
    return a + b * last


def of_all_steps(
    equations: Sequence[JaxprEqn], wanted: Sequence[Var], fixed: Values, stacked: Values
) -> Values:
    """Run equations for all steps at once; return the `wanted` variables [T, ...].

    fixed: values that all steps share. stacked: those of each step [T, ...].
    """
    if not wanted:
        return {}
    read = {v for eqn in equations for v in variables(eqn.invars)}
    names = [v for v in stacked if v in read]

    def one(*xs: Any) -> list[Any]:
        values = evaluate(equations, {**fixed, **dict(zip(names, xs, strict=True))})
        return [values[v] for v in wanted]

    return dict(zip(wanted, jax.vmap(one)(*(stacked[v] for v in names)), strict=True))


class Plan(NamedTuple):
    """Step taken apart: equations by when they run, and the variables that pass between them."""

    once: list[JaxprEqn]
    before: list[JaxprEqn]
    loop: list[JaxprEqn]
    after: list[JaxprEqn]
    rows: list[Var]
    """Inputs of the step."""
    ahead: list[Var]
    """Made by `before`, read later."""
    state: list[Var]
    """State before the step."""
    new: list[Atom]
    """State after the step."""
    weights: list[Var]
    """Made once, read by the loop."""
    inputs: list[Var]
    """Made of each step's inputs, read by the loop."""
    asked: tuple[int, ...]
    """Leaves of the new state that outputs are, or are made of."""
    crossing: list[Var]
    """Others of the loop that outputs are, or are made of."""
    late: list[Var]
    """Outputs made by `after`."""
    outputs: list[Atom]


def split(step: Traced, leaves: int) -> Plan:
    """Take a step apart, whose first `leaves` inputs and outputs are the state."""
    state, rows = step.inputs[:leaves], step.inputs[leaves:]
    new, outputs = step.outputs[:leaves], step.outputs[leaves:]
    rank = dict.fromkeys(step.constants, FIXED) | dict.fromkeys(rows, INPUT)
    rank = ranks(step.equations, rank | dict.fromkeys(state, STATE))
    maker = makers(step.equations)

    def outside(v: Var) -> bool:
        return rank[v] < STATE and not inflates(maker[v])

    loop_ids, reads = needed(new, maker, outside)
    in_loop = {v for eqn in step.equations if id(eqn) in loop_ids for v in eqn.outvars}
    renewed = dict.fromkeys(variables(new))

    def copied(v: Var) -> bool:
        """Whether it is a mere copy of what is at hand after the loop."""
        read = variables(maker[v].invars)
        kept = all(u in renewed or rank[u] < STATE for u in read)
        return kept and maker[v].primitive.name in COPIES

    def at_hand(v: Var) -> bool:
        return outside(v) or v in renewed or (v in in_loop and not copied(v))

    after_ids, ends = needed(outputs, maker, at_hand)
    crossing = [v for v in ends if rank[v] == STATE and v not in renewed]
    asked = tuple(i for i, v in enumerate(new) if v in ends)
    # an old state that outputs read is handed on by the loop
    reads = [v for v in reads if v not in state]
    finished = list(dict.fromkeys(variables(outputs)))
    ahead = dict.fromkeys(v for v in (*reads, *ends, *finished) if rank[v] == INPUT and v in maker)
    later = {v for eqn in step.equations if id(eqn) in after_ids for v in eqn.outvars}
    return Plan(
        once=of_rank(step.equations, rank, FIXED),
        before=of_rank(step.equations, rank, INPUT),
        loop=[eqn for eqn in step.equations if id(eqn) in loop_ids],
        after=[eqn for eqn in step.equations if id(eqn) in after_ids],
        rows=rows,
        ahead=list(ahead),
        state=state,
        new=new,
        weights=[v for v in reads if rank[v] == FIXED],
        inputs=[v for v in reads if rank[v] == INPUT],
        asked=asked,
        crossing=crossing,
        late=[v for v in finished if v in later and rank[v] == STATE],
        outputs=outputs,
    )


def inflates(eqn: JaxprEqn) -> bool:
    """Whether it is cheaper to do again than to read what it makes."""
    return eqn.primitive.name in COPIES and nbytes(eqn.outvars) > nbytes(variables(eqn.invars))


Body = Callable[[list[Any], list[Any], list[Any]], tuple[list[Any], list[Any]]]
Result = tuple[list[Any], list[Any], list[Any]]


def run(body: Body, asked: Sequence[int], length: int, weights: Any, state: Any, xs: Any) -> Result:
    """Scan `body(weights, state, x)`; return the last state, the leaves `asked` of every new state
    [T, ...], and the outputs [T, ...].
    """

    def step(state: list[Any], x: list[Any]) -> tuple[list[Any], tuple[list[Any], list[Any]]]:
        state, y = body(weights, state, x)
        return state, ([state[i] for i in asked], y)

    last, (states, ys) = jax.lax.scan(step, state, xs, length)
    return last, states, ys


loop = jax.custom_vjp(run, nondiff_argnums=(0, 1, 2))


def forward(
    body: Body, asked: Sequence[int], length: int, weights: Any, state: Any, xs: Any
) -> tuple[Result, tuple[Any, ...]]:
    """Run the loop and keep its states."""
    last, states, ys = run(body, range(len(state)), length, weights, state, xs)
    before = [jnp.concatenate([a[None], b[:-1]]) for a, b in zip(state, states, strict=True)]
    return (last, [states[i] for i in asked], ys), (weights, before, xs)


def backward(
    body: Body, asked: Sequence[int], length: int, kept: tuple[Any, ...], grads: Result
) -> tuple[Any, Any, Any]:
    """Gradients of weights, first state and inputs. What is not a float has none."""
    weights, before, xs = kept
    d_last, d_states, d_ys = grads
    floats = [i for i, x in enumerate(before) if differentiable(x)]
    float_ys = [i for i, d in enumerate(d_ys) if d.dtype != jax.dtypes.float0]

    def step(weights: Any, some: list[Any], state: list[Any], x: list[Any]) -> Any:
        """The step from and to floats; `some` are those of the state."""
        state = list(state)
        for i, x_i in zip(floats, some, strict=True):
            state[i] = x_i
        new, y = body(weights, state, x)
        return [new[i] for i in floats], [y[i] for i in float_ys]

    some = [before[i] for i in floats]
    pull = pullbacks(lambda s, state, x: step(weights, s, state, x), some, before, xs)
    asked_of = {i: d for i, d in zip(asked, d_states, strict=True) if i in floats}

    def back(d_state: list[Any], given: Any) -> tuple[list[Any], list[Any]]:
        row, d_new, d_y = given
        d_state = [d + d_new[i] if i in d_new else d for i, d in zip(floats, d_state, strict=True)]
        (earlier,) = pull.at(row)((d_state, d_y))
        return earlier, d_state

    d_last = [d_last[i] for i in floats]
    d_ys = [d_ys[i] for i in float_ys]
    given = (pull.rows, asked_of, d_ys)
    d_first, of_new = jax.lax.scan(back, d_last, given, length, reverse=True, unroll=UNROLL)
    all_steps = lambda weights, xs: jax.vmap(lambda s, state, x: step(weights, s, state, x))(
        some, before, xs
    )
    d_weights, d_xs = jax.vjp(all_steps, weights, xs)[1]((of_new, d_ys))
    d_begin = [np.zeros(x.shape[1:], jax.dtypes.float0) for x in before]
    for i, d in zip(floats, d_first, strict=True):
        d_begin[i] = d
    return d_weights, d_begin, d_xs


loop.defvjp(forward, backward)


def differentiable(x: Array) -> bool:
    """Whether it is of a type that has gradients."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


class Pullbacks(NamedTuple):
    """Backward passes of all steps to their first argument."""

    rows: list[Any]
    """Arrays that the backward pass of each step reads [T, ...]."""
    at: Callable[[list[Any]], Any]
    """Makes the backward pass of a step of its row."""


def pullbacks(step: Callable[..., Any], *args: PyTree[Array]) -> Pullbacks:
    """Linearise `step` at all steps at once; args: arguments of every step [T, ...].

    What depends on no argument is computed once and is no part of a row.
    """
    tree: Any = None

    def linearised(first: Any, *rest: Any) -> list[Any]:
        nonlocal tree
        leaves, tree = jax.tree.flatten(jax.vjp(lambda x: step(x, *rest), first)[1])
        return leaves

    like = jax.tree.map(lambda x: jax.eval_shape(lambda x: x[0], x), args)
    traced, _ = trace(linearised, *like)
    rank = ranks(traced.equations, dict.fromkeys(traced.inputs, INPUT))
    fixed = evaluate(of_rank(traced.equations, rank, FIXED), traced.constants)
    stacked = dict(zip(traced.inputs, jax.tree.leaves(args), strict=True))
    moving = [v for v in dict.fromkeys(variables(traced.outputs)) if v not in fixed]
    made = [v for v in moving if v not in stacked]
    stacked |= of_all_steps(of_rank(traced.equations, rank, INPUT), made, fixed, stacked)

    def at(row: list[Any]) -> Any:
        values = {**fixed, **dict(zip(moving, row, strict=True))}
        return tree.unflatten([value(v, values) for v in traced.outputs])

    return Pullbacks([stacked[v] for v in moving], at)
