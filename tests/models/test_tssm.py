"""The TSSM: recorded numbers of TransDreamer's modules, and one step at a time against a window at
once.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from reverie.models.tssm import TSSM, Concat, History, TSSMConfig, TSSMState, sinusoid
from reverie.nn.core import Style, build
from reverie.nn.latents import CategoricalLatent, GaussianLatent
from reverie.nn.transformer import BlockCausal, Gate, TransformerConfig
from reverie.types import UserError
from tests.golden_numbers import gate_from_torch, golden, layers_from_torch, linear_from_torch

close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
RELEASED = TransformerConfig(
    width=16,
    layers=2,
    heads=2,
    kv_heads=2,
    head_dim=8,
    mlp_ratio=2.0,
    time_every=1,
    context=50,
    softcap=0.0,
    rope_base=0.0,
    dtype='float32',
    norm='layer',
    qk_norm=False,
    mlp='relu',
)


def filled(module, params: dict):
    """The module with these weights; names and shapes must agree exactly but for what is left as it
    starts.
    """
    ours, bind = build(module)
    params = jax.tree.map(jnp.asarray, params)

    def put(own, given, path=''):
        assert set(given) <= set(own), (path, set(given) - set(own))
        return {
            k: put(v, given[k], f'{path}/{k}')
            if k in given and isinstance(v, dict)
            else given.get(k, v)
            for k, v in own.items()
        }

    merged = put(ours, params)
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
    assert shapes(merged) == shapes(ours)
    return bind(merged)


@pytest.mark.parametrize('residual', ['add', 'gtrxl'])
def test_every_layer_of_the_transformer_equals_the_reference(residual):
    g = golden('td/plain' if residual == 'add' else 'td/gtrxl')
    cfg = dataclasses.replace(RELEASED, residual=residual)
    blocks = filled(
        BlockCausal(cfg, np.zeros((1, RELEASED.head_dim // 2)), rngs=nnx.Rngs(0)),
        dict(layers=layers_from_torch(g, 'params/')),
    )
    position = sinusoid(jnp.arange(6), 16)
    close(position, g['pos'])
    with jax.default_matmul_precision('highest'):
        layer_outputs, _ = blocks.layer_outputs(
            (g['z'] + position)[:, :, None], jnp.zeros((2, 6), bool)
        )
    close(jnp.stack(layer_outputs, 2)[:, :, :, 0], g['out'])


def test_the_gate_equals_the_reference():
    g = golden('td/gate')
    gate = filled(Gate(RELEASED, nnx.Rngs(0)), gate_from_torch(g, 'params/'))
    close(gate(*map(jnp.asarray, (g['x'], g['y']))), g['out'])


def test_states_and_priors_equal_the_reference():
    g = golden('td/dyn')
    cfg = TSSMConfig(
        RELEASED,
        16,
        CategoricalLatent(8, 8),
        h=Concat(),
        prior_layers=1,
        feat='zh',
        style=Style('elu', 'none'),
    )
    prior = dict(
        hidden={0: linear_from_torch(g, 'params/prior_stoch_mlp.enc.0')},
        out=linear_from_torch(g, 'params/prior_stoch_mlp.enc.2'),
    )
    token = linear_from_torch(g, 'params/act_stoch_mlp')
    action_first = token['kernel']
    token['kernel'] = np.concatenate(
        [action_first[5:], action_first[:5]]
    )  # the released code puts the action first
    params = dict(
        blocks=dict(layers=layers_from_torch(g, 'params/cell.')),
        prior=prior,
        token=dict(linear=token),
    )
    model = filled(TSSM(cfg, 7, 5, rngs=nnx.Rngs(0)), params)
    state, prior_logits, h = model.initial(2), [], []
    imagine = jax.jit(lambda *xs: model.imagine(*xs))
    for t in range(6):
        state = state._replace(z=jnp.asarray(g['stoch'][:, t].reshape(2, 64)))
        state, dist = imagine(state, jnp.asarray(g['action'][:, t]), jax.random.key(t))
        h.append(state.h)
        prior_logits.append(dist.logits)
    close(jnp.stack(h, 1), g['deter'])
    expected = jax.nn.log_softmax(g['prior_logits'])
    close(jax.nn.log_softmax(jnp.stack(prior_logits, 1)), expected)


TINY = TransformerConfig(
    width=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_ratio=2.0,
    time_every=1,
    context=4,
    dtype='float32',
)
CONFIGS = {
    'myopic': TSSMConfig(TINY, 16, CategoricalLatent(4, 4, 0.01)),
    'history': TSSMConfig(
        dataclasses.replace(TINY, residual='gtrxl'),
        16,
        GaussianLatent(6),
        History(),
        Concat(),
        feat='zh',
    ),
    'absolute': TSSMConfig(
        dataclasses.replace(RELEASED, context=4), 16, CategoricalLatent(4, 4), h=Concat()
    ),
}
B, T, E, A = 2, 11, 5, 3  # more than twice the context of 4


@pytest.fixture(scope='module', params=CONFIGS)
def case(request):
    cfg, r = CONFIGS[request.param], np.random.default_rng(0)
    params, bind = build(TSSM(cfg, E, A, rngs=nnx.Rngs(0)))
    embed, action = (jnp.asarray(r.normal(size=(B, T, n)), jnp.float32) for n in (E, A))
    is_first = jnp.zeros((B, T), bool).at[:, 0].set(True).at[0, 6].set(True)
    run = jax.jit(lambda p, state, *xs: bind(p).unroll(state, *xs, jax.random.key(0)))
    out = run(params, bind(params).initial(B), embed, action, is_first)
    return cfg, params, bind, embed, action, is_first, run, out


def test_a_window_at_once_equals_one_step_after_the_other_also_past_the_context(case):
    _, params, bind, embed, action, is_first, _, out = case
    keys = jax.random.split(jax.random.key(0), T)
    observe = jax.jit(lambda *xs: bind(params).observe(*xs))
    state = bind(params).initial(B)
    for t in range(T):
        state, post, prior = observe(state, embed[:, t], action[:, t], is_first[:, t], keys[t])
        at = lambda x, t=t: jax.tree.map(lambda y: y[:, t], x)
        near(state.h, out.state.h[:, t])
        near(state.z, out.state.z[:, t])
        for one, of_window in (
            (post, out.post),
            (prior, out.prior),
            (bind(params).pack(state), out.memory),
        ):
            jax.tree.map(near, one, at(of_window))


def test_imagination_from_cut_caches_equals_imagination_from_prefixes_taken_in_again(case):
    _, params, bind, embed, action, is_first, _, out = case
    keys, last = jax.random.split(jax.random.key(0), T), 5
    rows = jax.jit(lambda p, out: bind(p).starts(out, last))(params, out)
    imagine = jax.jit(lambda p, *xs: bind(p).imagine(*xs))

    def dream(state: TSSMState):
        found = []
        for i in range(6):  # past the context once more
            a = jax.nn.one_hot(jnp.full(len(state.h), i % A), A)
            state, _ = imagine(params, state, a, jax.random.key(9))
            found.append(state.h)
        return jnp.stack(found, 1)

    observe = jax.jit(lambda *xs: bind(params).observe(*xs))
    state, states = bind(params).initial(B), []
    for t in range(T):
        state, _, _ = observe(state, embed[:, t], action[:, t], is_first[:, t], keys[t])
        states.append(state)
    again = jax.tree.map(
        lambda *x: jnp.stack(x[-last:], 1).reshape(B * last, *x[0].shape[1:]), *states
    )
    near(rows.z, again.z)
    near(dream(rows), dream(again))


def test_no_gradient_crosses_the_start_of_an_episode_or_comes_from_the_future(case):
    _, params, bind, embed, action, is_first, _, _ = case

    def size(embed, action):
        out = bind(params).unroll(
            bind(params).initial(B), embed, action, is_first, jax.random.key(0)
        )
        return out.feat**2 @ jnp.ones(out.feat.shape[-1]) + out.prior.entropy()

    def grads(embed, action):
        _, back = jax.vjp(size, embed, action)
        later, early = jnp.zeros((B, T)).at[0, 6:].set(1), jnp.zeros((B, T)).at[:, :4].set(1)
        return back(later), back(early)

    (of_embed, of_action), (embed_early, action_early) = jax.jit(grads)(embed, action)
    assert not of_embed[0, :6].any() and not of_action[0, :7].any()
    assert of_embed[0, 6:].any() and of_action[0, 7:].any()
    assert not embed_early[:, 4:].any() and not action_early[:, 4:].any()
    assert embed_early[:, :4].any() and action_early[1, 1:4].any()


def test_a_myopic_posterior_does_not_know_the_past(case):
    cfg, params, bind, embed, action, is_first, run, out = case
    other = run(params, bind(params).initial(B), embed.at[:, :3].add(1), action + 1, is_first)
    same = jax.tree.map(lambda a, b: np.array_equal(a[:, 3:], b[:, 3:]), out.post, other.post)
    assert all(jax.tree.leaves(same)) == (not isinstance(cfg.posterior, History))
    assert not np.array_equal(out.prior.kl(out.post)[:, 3:], other.prior.kl(other.post)[:, 3:])


def test_a_window_goes_on_from_the_steps_that_replay_stored(case):
    """One layer: memories reach as far back as its attention does, so nothing is lost at the seam."""
    cfg, _, _, embed, action, is_first, _, _ = case
    cfg = dataclasses.replace(cfg, transformer=dataclasses.replace(cfg.transformer, layers=1))
    params, bind = build(TSSM(cfg, E, A, rngs=nnx.Rngs(0)))
    model, half = bind(params), T // 2
    run = jax.jit(lambda state, *xs: model.unroll(state, *xs, jax.random.key(0)))
    rest = lambda state: run(
        state, embed[:, half : 2 * half], action[:, half : 2 * half], is_first[:, half : 2 * half]
    )
    first = run(model.initial(B), embed[:, :half], action[:, :half], is_first[:, :half])
    after, memory, unpack = model.starts(first, 1), first.memory, jax.jit(model.unpack)
    resumed = unpack(memory)
    near(resumed.z, after.z)
    if cfg.transformer.rope_base:  # absolute positions count from the first step that is remembered
        near(rest(resumed).feat, rest(after).feat)
    missing = jax.tree.map(lambda x: x.at[:, :3].set(jnp.zeros_like(x[:, :3])), memory)
    near(rest(unpack(missing)).feat, rest(unpack(jax.tree.map(lambda x: x[:, 3:], memory))).feat)
    nothing, blank = rest(unpack(jax.tree.map(jnp.zeros_like, memory))), rest(model.initial(B))
    near(nothing.feat[0, 1:], blank.feat[0, 1:])  # an episode begins at the row's second step


def test_attention_sums_to_one_and_stays_within_reach_and_episode(case):
    cfg, params, bind, _, action, is_first, _, out = case
    attention_maps = jax.jit(lambda p, *xs: bind(p).attention(bind(p).initial(B), *xs))(
        params, out.state.z, action, is_first
    )
    context, t = cfg.transformer.context, np.arange(T)
    assert attention_maps.shape == (cfg.transformer.layers, B, cfg.transformer.heads, T, T)
    np.testing.assert_allclose(attention_maps.sum(-1), 1, rtol=1e-5)
    own = np.asarray(attention_maps)
    may = (t <= t[:, None]) & (t > t[:, None] - context)
    assert (own[:, 1] > 0).sum() == may.sum() * own[:, 1, :, 0, 0].size
    assert not own[:, 0, :, 6:, :6].any()


def test_gradients_reach_every_weight(case):
    _, params, bind, embed, action, is_first, _, _ = case

    def loss(p):
        out = bind(p).unroll(bind(p).initial(B), embed, action, is_first, jax.random.key(0))
        return (out.feat**2).sum() + out.post.kl(out.prior).sum()

    for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        unused = (
            jax.tree_util.keystr(path).startswith("['blocks']['norm']") and case[0].h == Concat()
        )
        assert unused or float(jnp.abs(grad).max()) > 0, path


def test_layers_across_space_are_refused():
    with pytest.raises(UserError, match='time_every=4'):
        TSSMConfig(TransformerConfig()).build(4, 2, nnx.Rngs(0))
