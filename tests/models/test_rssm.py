"""The RSSMs of four papers: recorded numbers of three, and what must hold for all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from reverie.models.rssm import GRU, RSSM, BlockGRU, RSSMConfig, RSSMState, size
from reverie.nn.core import Style, build
from reverie.nn.dists import Normal, OneHots
from reverie.nn.latents import CategoricalLatent, GaussianLatent
from reverie.types import UserError, sg
from tests.golden_numbers import golden, rssm_from_v3

close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
V1 = Style('elu', 'none', init='glorot_uniform')
CONFIGS = {
    'planet': RSSMConfig(
        8, 6, GaussianLatent(4), GRU('reset_before'), 1, 1, 'zh', Style('relu', 'none')
    ),
    'dreamer_v1': RSSMConfig(8, 10, GaussianLatent(4), GRU('reset_after'), 1, 1, 'zh', V1),
    'dreamer_v2': RSSMConfig(16, 12, CategoricalLatent(4, 8), GRU('layer_norm'), 1, 1, 'zh', V1),
    'dreamer_v3': RSSMConfig(
        64, 16, CategoricalLatent(4, 8, 0.01), BlockGRU(8), 2, 1, 'hz', Style()
    ),
}


@pytest.fixture
def modes(monkeypatch):
    """The references were recorded without chance."""
    for dist in (OneHots, Normal):
        monkeypatch.setattr(dist, 'sample', lambda self, key: self.mode())


def filled(cfg: RSSMConfig, embed: int, actions: int, params: dict):
    """(params, bind) with these weights; names and shapes must agree exactly."""
    ours, bind = build(RSSM(cfg, embed, actions, rngs=nnx.Rngs(0)))
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
    assert shapes(ours) == shapes(params)
    return jax.tree.map(jnp.asarray, params), bind


def unrolled(params, bind, embed, action, is_first):
    run = jax.jit(
        lambda p, *xs: bind(p).unroll(bind(p).initial(embed.shape[0]), *xs, jax.random.key(0))
    )
    with jax.default_matmul_precision('highest'):
        return run(params, *map(jnp.asarray, (embed, action, is_first)))


def test_v3_equals_the_reference(modes):
    g = golden('v3/rssm')
    flat = {k.removeprefix('params/'): v for k, v in g.items() if k.startswith('params/')}
    params, bind = filled(CONFIGS['dreamer_v3'], 20, 5, rssm_from_v3(flat))
    out = unrolled(params, bind, g['tokens'], np.eye(5, dtype=np.float32)[g['prevact']], g['reset'])
    close(out.state.h, g['deter'])
    close(out.state.z.reshape(3, 6, 4, 8), g['stoch'])
    same = lambda dist, logits: close(
        jax.nn.softmax(dist.logits), 0.99 * jax.nn.softmax(logits) + 0.01 / 8
    )
    same(out.post, g['logit'])
    same(out.prior, g['prior_logit'])
    close(jnp.maximum(1, sg(out.post).kl(out.prior)), g['dyn'])
    close(jnp.maximum(1, out.post.kl(sg(out.prior))), g['rep'])
    close(out.feat, jnp.concatenate([out.state.h, out.state.z], -1))
    state, imagine = (
        jax.tree.map(lambda x: x[:, -1], out.state),
        jax.jit(lambda *xs: bind(params).imagine(*xs)),
    )
    for t in range(4):
        state, prior = imagine(state, jax.nn.one_hot(g['imag_act'][:, t], 5), jax.random.key(0))
        close(state.h, g['imag_deter'][:, t])
        same(prior, g['imag_logit'][:, t])


def test_v3_recurrence_equals_the_reference_for_actions_beyond_one():
    g = golden('v3/core')
    flat = {k.removeprefix('params/'): v for k, v in g.items() if k.startswith('params/')}
    ours, bind = build(RSSM(CONFIGS['dreamer_v3'], 20, 3, rngs=nnx.Rngs(0)))
    params = dict(ours, **jax.tree.map(jnp.asarray, rssm_from_v3(flat)))
    step = jax.jit(lambda p, state, a: bind(p).core(state, bind(p).core.prepare(a)))
    assert np.abs(g['a']).max() > 1
    state = RSSMState(jnp.asarray(g['h']), jnp.asarray(g['z']).reshape(3, -1))
    with jax.default_matmul_precision('highest'):
        close(step(params, state, jnp.asarray(g['a'])), g['out'])


def test_v2_equals_the_reference(modes):
    g = golden('v2/rssm')
    linear = lambda name: dict(kernel=g[f'{name}/kernel'], bias=g[f'{name}/bias'])
    cell = dict(linear=linear('gru'), norm=dict(scale=g['gru/ln_gamma'], shift=g['gru/ln_beta']))
    params = dict(
        core=dict(input=dict(linear=linear('img_in')), cell=cell),
        prior=dict(hidden={0: linear('img_out_0')}, out=linear('img_dist_0')),
        post=dict(hidden={0: linear('obs_out')}, out=linear('obs_dist')),
    )
    params, bind = filled(CONFIGS['dreamer_v2'], 10, 3, params)
    out = unrolled(params, bind, g['embed'], g['action'], g['is_first'] > 0)
    close(out.state.h, g['deter'])
    close(out.post.logits, g['post_logit'])
    close(out.prior.logits, g['prior_logit'])
    close(out.feat, jnp.concatenate([out.state.z, out.state.h], -1))


def test_v1_equals_the_reference(modes):
    g = golden('v1/rssm')
    linear = lambda name: dict(kernel=g[f'{name}/kernel'], bias=g[f'{name}/bias'])
    cell = dict(
        input=dict(kernel=g['gru/kernel'], bias=g['gru/bias'][0]),
        recurrent=dict(kernel=g['gru/recurrent_kernel'], bias=g['gru/bias'][1]),
    )
    params = dict(
        core=dict(input=dict(linear=linear('img1')), cell=cell),
        prior=dict(hidden={0: linear('img2')}, out=linear('img3')),
        post=dict(hidden={0: linear('obs1')}, out=linear('obs2')),
    )
    params, bind = filled(CONFIGS['dreamer_v1'], 6, 2, params)
    out = unrolled(params, bind, g['embed'], g['prev_action'], np.zeros((3, 5), bool))
    close(out.state.h, g['deter'])
    for dist, name in ((out.post, 'post'), (out.prior, 'prior')):
        close(dist.mean, g[f'{name}_mean'])
        close(dist.std, g[f'{name}_std'])


@pytest.fixture(scope='module', params=CONFIGS)
def case(request):
    cfg, r = CONFIGS[request.param], np.random.default_rng(0)
    params, bind = build(RSSM(cfg, 5, 3, rngs=nnx.Rngs(0)))
    embed, action = (jnp.asarray(r.normal(size=(2, 6, n)), jnp.float32) for n in (5, 3))
    return cfg, params, bind, embed, action, jnp.zeros((2, 6), bool).at[0, 3].set(True)


def test_a_scan_equals_one_frame_after_the_other(case):
    _, params, bind, embed, action, is_first = case
    out = unrolled(params, bind, embed, action, is_first)
    model, keys = bind(params), jax.random.split(jax.random.key(0), 6)
    state = model.initial(2)
    observe = jax.jit(lambda *xs: bind(params).observe(*xs))
    for t in range(6):
        state, post, prior = observe(state, embed[:, t], action[:, t], is_first[:, t], keys[t])
        at = lambda x, t=t: jax.tree.map(lambda y: y[:, t], x)
        for one, of_scan in ((state, out.state), (post, out.post), (prior, out.prior)):
            jax.tree.map(close, one, at(of_scan))
        close(model.feat(state), out.feat[:, t])


def test_nothing_crosses_the_start_of_an_episode(case):
    _, params, bind, embed, action, is_first = case
    out = unrolled(params, bind, embed, action, is_first)
    other = unrolled(params, bind, embed.at[0, :3].add(1), action.at[0, :4].add(1), is_first)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[:, 3:], b[:, 3:]), out.state, other.state
    )
    assert not jnp.array_equal(out.state.h[0, :3], other.state.h[0, :3])


def test_a_window_goes_on_from_what_replay_stored(case):
    _, params, bind, embed, action, is_first = case
    model = bind(params)
    run = jax.jit(lambda p, state, *xs: bind(p).unroll(state, *xs, jax.random.key(3)))
    first = run(params, model.initial(2), embed[:, :3], action[:, :3], is_first[:, :3])
    memory = jax.tree.map(lambda x: x[:, -1:], first.memory)
    rest = (embed[:, 3:], action[:, 3:], is_first[:, 2:5])
    expected = run(params, jax.tree.map(lambda x: x[:, -1], first.state), *rest)
    jax.tree.map(close, run(params, model.unpack(memory), *rest).state, expected.state)
    nothing = model.unpack(jax.tree.map(jnp.zeros_like, memory))
    jax.tree.map(np.testing.assert_array_equal, nothing, model.initial(2))


def test_gradients_reach_every_weight_through_the_latents(case):
    _, params, bind, embed, action, is_first = case

    def loss(p):
        out = bind(p).unroll(bind(p).initial(2), embed, action, is_first, jax.random.key(0))
        return (out.feat**2).sum() + out.post.kl(out.prior).sum()

    for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert float(jnp.abs(grad).max()) > 0, path


def test_half_precision_products_stay_close_to_full_ones(case):
    cfg, params, _, embed, action, is_first = case
    half = dataclasses.replace(cfg, style=dataclasses.replace(cfg.style, dtype='bfloat16'))
    ours, bind = build(RSSM(half, 5, 3, rngs=nnx.Rngs(0)))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(ours))
    run = lambda bind: unrolled(params, bind, embed[:, :1], action[:, :1], is_first[:, :1]).state.h
    np.testing.assert_allclose(run(bind), run(case[2]), atol=0.03)


def test_one_dial_sets_the_size():
    assert size('12m') == (2048, 256, 16, 16, 256)
    assert [size(f'{n}m').deter for n in (1, 25, 50, 100, 200, 400)] == [
        512,
        3072,
        4096,
        6144,
        8192,
        12288,
    ]
    with pytest.raises(UserError, match='1m, 12m'):
        size('big')
    with pytest.raises(UserError, match='blocks=8'):
        RSSM(dataclasses.replace(CONFIGS['dreamer_v3'], deter=60), 5, 3, rngs=nnx.Rngs(0))
