"""`lean_scan` computes what `jax.lax.scan` does, with less in the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.nn.equations import trace
from reverie.nn.scan import discounted, lean_scan, split

STEPS, ROWS, WIDTH = 7, 3, 4


def unroll(scan, weights, bias, state, xs, key):
    """A recurrence with noise, an integer in the state, and outputs of every sort."""
    triangle = jnp.triu(jnp.ones((WIDTH, WIDTH)))

    def step(carry, given):
        (h, count, untouched), (x, key, _) = carry, given
        noise = 0.1 * jax.random.normal(key, h.shape)
        inner = jax.nn.silu(h @ weights.astype(jnp.float32) + x @ bias) + noise
        new = jnp.tanh(inner @ triangle) + untouched
        out = dict(
            head=jax.nn.softmax(new @ bias), input=x, count=count + 1, weights=weights, old=h,
            number=1.0, zeros=jnp.zeros((3, 2)), wide=jnp.tile(x, 3), inner=inner, new=new,
            cast=new.astype(jnp.bfloat16),
        )  # fmt: skip
        return (new, count + 1, untouched), out

    keys = jax.random.split(key, len(xs))
    return scan(step, (state, jnp.int32(0), 0.1 * state), (xs, keys, xs))


def arguments(seed):
    keys = jax.random.split(jax.random.key(seed), 5)
    weights, bias = jax.random.normal(keys[0], (2, WIDTH, WIDTH))
    state = jax.random.normal(keys[1], (ROWS, WIDTH))
    return weights, bias, state, jax.random.normal(keys[2], (STEPS, ROWS, WIDTH)), keys[3]


def total(scan, *args):
    leaves = jax.tree.leaves(unroll(scan, *args))
    return sum(jnp.sin(x.astype(jnp.float32)).sum() for x in leaves)


def values_and_gradients(scan):
    loss = lambda *args: total(scan, *args)
    return lambda *args: (unroll(scan, *args), jax.grad(loss, argnums=(0, 1, 2, 3))(*args))


def assert_same(ours, theirs, atol):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=atol, rtol=1e-5)


def test_values_and_gradients_are_those_of_scan():
    ours, theirs = (
        jax.jit(values_and_gradients(s))(*arguments(0)) for s in (lean_scan, jax.lax.scan)
    )
    assert_same(ours, theirs, 1e-5)
    assert any(np.abs(x).max() > 0.1 for x in jax.tree.leaves(theirs[1]))


def test_two_seeds_under_vmap_are_each_as_alone():
    both = jax.tree.map(lambda *x: jnp.stack(x), arguments(0), arguments(1))
    together = jax.vmap(values_and_gradients(lean_scan))(*both)
    for i in range(2):
        alone = values_and_gradients(jax.lax.scan)(*arguments(i))
        assert_same(jax.tree.map(lambda x, i=i: x[i], together), alone, 1e-5)


def test_a_gradient_of_one_output_alone():
    """Outputs that nothing reads have no gradient to hand back."""

    def loss(scan, weights, *rest):
        return unroll(scan, weights, *rest)[1]['head'][-1].sum()

    weights, *rest = arguments(2)
    ours, theirs = (
        jax.grad(lambda w, s=s: jnp.square(loss(s, w, *rest)))(weights)
        for s in (lean_scan, jax.lax.scan)
    )
    assert_same(ours, theirs, 1e-6)


def test_bfloat16_stays_within_its_rounding():
    half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    weights, _, state, xs, _ = arguments(3)

    def loss(scan, weights):
        step = lambda h, x: ((jnp.tanh(h @ half(weights) + half(x))), h)
        last, hs = scan(step, half(state), xs)
        return (last.astype(jnp.float32) ** 2).sum() + hs.astype(jnp.float32).sum()

    ours, theirs = (jax.grad(lambda w, s=s: loss(s, w))(weights) for s in (lean_scan, jax.lax.scan))
    scale = float(jnp.abs(theirs).max())
    np.testing.assert_allclose(ours / scale, theirs / scale, atol=3e-2)


def test_outputs_that_do_not_depend_on_the_state():
    def step(h, x):
        return jnp.tanh(h + x), (jnp.zeros(3), jnp.tile(x, 2), weights)

    weights, _, state, xs, _ = arguments(0)
    assert_same(lean_scan(step, state, xs), jax.lax.scan(step, state, xs), 1e-6)


def test_a_step_that_needs_no_input():
    step = lambda h, x: (jnp.sin(h + weights), None)
    weights, _, state, xs, _ = arguments(0)
    loss = lambda scan: jax.grad(lambda h: scan(step, h, xs)[0].sum())(state[:1, :1])
    weights = weights[:1, :1]
    assert_same(loss(lean_scan), loss(jax.lax.scan), 1e-6)


def test_a_step_that_changes_the_state_s_type_is_refused():
    with pytest.raises(TypeError, match=r'float16\[3, 4\] of a state float32\[3, 4\]'):
        lean_scan(lambda h, x: (h.astype(jnp.float16), x), jnp.ones((3, 4)), jnp.ones(2))


def test_the_loop_holds_what_the_state_needs_and_no_more():
    def step(h, given):
        x, key = given
        noise = jax.random.uniform(key, h.shape)  # of the input alone
        new = jnp.tanh(h @ jnp.sin(weights) + noise + x)
        return new, jnp.exp(new)  # a head

    weights, _, state, xs, key = arguments(0)
    keys = jax.random.split(key, STEPS)
    plan = split(trace(step, state, (xs[0], keys[0]))[0], 1)
    names = lambda equations: {eqn.primitive.name for eqn in equations}
    assert names(plan.loop) <= {'dot_general', 'add', 'tanh'}
    assert 'sin' in names(plan.once)
    assert 'random_bits' in names(plan.before)
    assert names(plan.after) == {'exp'} and plan.crossing == []


def test_the_backward_loop_carries_no_gradient_of_weights():
    weights, bias, state, xs, key = arguments(0)
    program = jax.make_jaxpr(jax.grad(lambda w: total(lean_scan, w, bias, state, xs, key)))(weights)
    backward = [e for e in program.eqns if e.primitive.name == 'scan' and e.params['reverse']]
    assert len(backward) == 1
    carried = backward[0].params['num_carry']
    body = backward[0].params['jaxpr'].jaxpr
    consts = backward[0].params['num_consts']
    shapes = [v.aval.shape for v in body.invars[consts : consts + carried]]
    assert shapes == [state.shape, state.shape]  # of the two states that are floats


@given(st.integers(1, 20), st.integers(0, 2**31 - 1))
@settings(max_examples=25, deadline=None)
def test_discounted_sums_are_those_of_a_loop(steps, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, steps, 3)).astype(np.float32)
    last = rng.normal(size=3).astype(np.float32)
    found = np.asarray(discounted(jnp.asarray(a), jnp.asarray(b), jnp.asarray(last)))
    expected = last.astype(np.float64)
    for t in reversed(range(steps)):
        expected = a[t] + b[t] * expected
        np.testing.assert_allclose(found[t], expected, rtol=1e-4, atol=1e-4)
