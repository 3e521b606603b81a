"""Observations of every kind in and out, and a whole Dreamer V3 against the reference's weights by
name.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from reverie.models.rssm import RSSM, BlockGRU, RSSMConfig, size
from reverie.nn.core import MLP, Style, build, count
from reverie.nn.dists import Normal, OneHots
from reverie.nn.encoders import ObsConfig, ObsDecoder, ObsEncoder, kind
from reverie.nn.latents import CategoricalLatent
from reverie.nn.vision import PooledConv, StridedConv
from reverie.types import UserError
from tests.golden_numbers import golden, ours_from_v3

SMALL = ObsConfig(PooledConv(2, blocks=4), units=16)
STYLE = Style()


def shaped(make) -> tuple[dict, object]:
    """Build the module that `make` makes without computing a weight; return (shapes, bind)."""
    bind = []

    def run():
        params, b = build(make())
        bind.append(b)
        return params

    return jax.eval_shape(run), bind[0]


def modules(
    rssm: RSSMConfig, obs: ObsConfig, shapes, actions: int, outputs: int
) -> dict[str, nnx.Module]:
    """Dreamer V3's trained networks; `outputs` of the actor. 255 bins for reward and value."""
    rngs, inputs = nnx.Rngs(0), (rssm.deter, rssm.latent.size)
    encoder = ObsEncoder(obs, shapes, rngs=rngs)
    head = lambda layers, out: MLP(rssm.width, obs.units, layers, out, style=STYLE, rngs=rngs)
    return dict(
        encoder=encoder,
        rssm=RSSM(rssm, encoder.width, actions, rngs=rngs),
        decoder=ObsDecoder(obs, shapes, inputs, rngs=rngs),
        reward=head(1, 255),
        cont=head(1, 1),
        actor=head(3, outputs),
        critic=head(3, 255),
    )


@pytest.fixture(
    scope='module', params=[('full_disc', 5, 5), ('full_cont', 3, 6)], ids=lambda p: p[0]
)
def whole(request):
    """(golden numbers, params by module, bind by module) of the reference's tiny agents."""
    name, actions, outputs = request.param
    rssm = RSSMConfig(32, 12, CategoricalLatent(4, 4, 0.01), BlockGRU(4))
    shapes = dict(image=(64, 64, 3), vector=(5,))
    make = lambda key: lambda: modules(rssm, SMALL, shapes, actions, outputs)[key]
    names = ('encoder', 'rssm', 'decoder', 'reward', 'cont', 'actor', 'critic')
    built = {k: shaped(make(k)) for k in names}
    theirs = ours_from_v3({k: v for k, v in golden(f'v3/{name}/params').items()})
    return (
        golden(f'v3/{name}'),
        {k: v[0] for k, v in built.items()},
        theirs,
        {k: v[1] for k, v in built.items()},
    )


def test_every_weight_has_the_references_shape_and_none_is_left(whole):
    g, ours, theirs, _ = whole
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
    assert shapes(ours) == shapes(theirs)
    total = sum(v.size for k, v in g.items() if k.startswith('params/') and 'slowval' not in k)
    assert count(ours) == total
    if 'data/action' in g and g['data/action'].ndim == 2:
        assert total == 34_896


def test_reconstruction_and_divergence_losses_equal_the_references(whole, monkeypatch):
    g, _, theirs, bind = whole
    monkeypatch.setattr(OneHots, 'sample', lambda self, key: self.mode())
    obs = {k: jnp.asarray(g[f'data/{k}']) for k in ('image', 'vector')}
    action = g['data/action']
    action = np.eye(5, dtype=np.float32)[action] if action.ndim == 2 else action
    first = jnp.asarray(g['data/is_first'])
    action = jnp.asarray(np.concatenate([np.zeros_like(action[:, :1]), action[:, :-1]], 1))

    @jax.jit
    def losses(params):
        model = bind['rssm'](params['rssm'])
        out = model.unroll(
            model.initial(2),
            bind['encoder'](params['encoder'])(obs),
            action,
            first,
            jax.random.key(0),
        )
        dists = bind['decoder'](params['decoder'])(*out.state)
        found = {k: -dist.log_prob(obs[k]) for k, dist in dists.items()}
        return dict(found, dyn=jnp.maximum(1, out.post.kl(out.prior)))

    with jax.default_matmul_precision('highest'):
        found = losses(jax.tree.map(jnp.asarray, theirs))
    for name in ('image', 'vector', 'dyn'):
        np.testing.assert_allclose(found[name], g[f'step0/loss/{name}'], rtol=1e-4, atol=1e-5)


SHAPES = {
    'grid': (10, 10, 4),
    'vector': (7,),
    'image': (64, 64, 3),
    'all': {
        'vector': (7,),
        'grid': (10, 10, 4),
        'number': (),
        'front': (64, 64, 3),
        'depth': (64, 64, 1),
    },
}


def observation(shape: tuple[int, ...]) -> jnp.ndarray:
    r = np.random.default_rng(0)
    if kind(shape) == 'image':
        return jnp.asarray(r.integers(0, 256, (2, 3, *shape)), jnp.uint8)
    return (
        jnp.asarray(r.normal(size=(2, 3, *shape)) > 0)
        if kind(shape) == 'grid'
        else jnp.ones((2, 3, *shape))
    )


@pytest.mark.parametrize('name', SHAPES)
@pytest.mark.parametrize(
    'cfg', [SMALL, ObsConfig(StridedConv(2), 8, 2, False, 'bernoulli', Style('elu', 'none'))]
)
def test_what_goes_in_comes_out_as_laws_with_one_number_per_step(name, cfg):
    shapes = SHAPES[name]
    obs = (
        {k: observation(s) for k, s in shapes.items()}
        if isinstance(shapes, dict)
        else observation(shapes)
    )

    def run(obs):
        encoder, decoder = (
            ObsEncoder(cfg, shapes, rngs=nnx.Rngs(0)),
            ObsDecoder(cfg, shapes, (8, 6), rngs=nnx.Rngs(0)),
        )
        embed = encoder(obs)
        assert embed.shape == (2, 3, encoder.width)
        return decoder(jnp.zeros((2, 3, 8)), jnp.zeros((2, 3, 6)))

    dists = jax.eval_shape(run, obs)
    for dist, x in (
        [(dists[k], obs[k]) for k in shapes] if isinstance(shapes, dict) else [(dists, obs)]
    ):
        assert jax.eval_shape(lambda dist, x: dist.log_prob(x), dist, x).shape == (2, 3)
        assert jax.eval_shape(lambda dist: dist.mode(), dist).shape == x.shape


def test_the_order_of_keys_does_not_matter():
    a, b = {'b': (3,), 'a': (2,)}, {'a': (2,), 'b': (3,)}
    obs = {'b': jnp.ones((1, 3)), 'a': jnp.zeros((1, 2))}
    embed = [
        ObsEncoder(SMALL, s, rngs=nnx.Rngs(0))(o)
        for s, o in ((a, obs), (b, dict(reversed(obs.items()))))
    ]
    np.testing.assert_array_equal(*embed)


def test_vectors_are_normal_unless_squashed():
    cfg = ObsConfig(symlog=False, units=4)
    assert isinstance(
        ObsDecoder(cfg, (3,), (2, 2), rngs=nnx.Rngs(0))(jnp.zeros((1, 2)), jnp.zeros((1, 2))),
        Normal,
    )


def test_shapes_that_mean_nothing_are_refused():
    with pytest.raises(UserError, match=r'\[64, 64\]'):
        ObsEncoder(SMALL, (64, 64), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match='same for all'):
        ObsEncoder(SMALL, dict(a=(64, 64, 3), b=(96, 96, 3)), rngs=nnx.Rngs(0))


TABLE = [
    ('1m', 0.69),
    ('12m', 10.5),
    ('25m', 23.5),
    ('50m', 41.7),
    ('100m', 93.5),
    ('200m', 166),
    ('400m', 373),
]


@pytest.mark.parametrize(('name', 'millions'), TABLE)
def test_sizes_have_the_number_of_weights_of_the_references_table(name, millions):
    s = size(name)
    rssm = RSSMConfig(s.deter, s.hidden, CategoricalLatent(32, s.classes, 0.01), BlockGRU(8))
    obs = ObsConfig(PooledConv(s.depth), s.units)

    make = lambda: {k: build(m)[0] for k, m in modules(rssm, obs, (64, 64, 3), 17, 17).items()}
    assert count(jax.eval_shape(make)) / 1e6 == pytest.approx(millions, rel=0.01)
