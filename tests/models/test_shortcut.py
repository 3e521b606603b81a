"""The dynamics: cache = parallel, firewalls by gradient, every number of sampling steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from reverie.models.dynamics import Dynamics, DynamicsConfig
from reverie.models.shortcut import ShortcutModel
from reverie.models.tokenizer import Decoder, Encoder, TokenizerConfig
from reverie.nn.core import build, cast_kernels
from reverie.nn.transformer import TransformerConfig
from reverie.types import Step, UserError

TINY = TransformerConfig(
    width=16,
    layers=4,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_ratio=2.0,
    time_every=2,
    context=4,
    dtype='float32',
)
CFG = DynamicsConfig(
    pack=2, registers=2, k_max=8, sampling_steps=4, context_noise=0.0, transformer=TINY
)
TOKENIZER = TokenizerConfig(patch=(2, 2), latents=4, bottleneck=3, transformer=TINY)
SHAPE, B, T, A = (4, 4, 2), 2, 11, 5


def dynamics(**changes) -> Dynamics:
    return Dynamics(dataclasses.replace(CFG, **changes), 4, 3, A, nnx.Rngs(0))


@pytest.fixture(scope='module')
def model():
    return ShortcutModel(
        dynamics(), Encoder(TOKENIZER, SHAPE, nnx.Rngs(1)), Decoder(TOKENIZER, SHAPE, nnx.Rngs(2))
    )


@pytest.fixture(scope='module')
def step():
    key = jax.random.key(0)
    first = jnp.zeros((B, T), bool).at[:, 0].set(True).at[1, 6].set(True)
    action = jax.nn.one_hot(jax.random.randint(key, (B, T), 0, A), A) * ~first[..., None]
    obs = jax.random.bernoulli(key, 0.4, (B, T, *SHAPE))
    return Step(
        obs, action, jnp.zeros((B, T)), first, jnp.roll(first, -1, 1), jnp.roll(first, -1, 1)
    )


def run(model, step, agent=True):
    """The parallel pass on random latents with random levels."""
    z = jax.random.normal(jax.random.key(5), (B, T, model.tokens, model.channels))
    signal_level = jax.random.randint(jax.random.key(6), (B, T), 0, 8)
    step_exponent, labelled = jnp.full((B, T), 3), jnp.ones((B, T), bool)
    return z, lambda z: model(
        z, signal_level, step_exponent, step.prev_action, labelled, step.is_first, agent=agent
    )


def test_observing_frame_by_frame_equals_tokenizing_and_prefilling_the_window(model, step):
    @jax.jit
    def both(step):
        z, _ = model.encoder(step.obs.astype(jnp.float32), step.is_first)
        z = model.dynamics.packed(z)
        prefilled, feat = model.prefill(z, step, jnp.ones(B, bool), jax.random.key(0))

        def one(state, x):
            state, feat = model.observe(state, x, jax.random.key(0))
            return state, feat

        major = jax.tree.map(lambda x: x.swapaxes(0, 1), step)
        state, feats = jax.lax.scan(one, model.initial(B), major)
        return prefilled, feat, state, feats.swapaxes(0, 1)

    prefilled, feat, state, feats = both(step)
    assert 2 * TINY.context < T
    np.testing.assert_allclose(feats, feat, atol=1e-5)
    for a, b in zip(
        jax.tree.leaves(prefilled.dynamics), jax.tree.leaves(state.dynamics), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_frames_look_at_the_past_of_their_episode_within_the_context(model, step):
    attention_maps = np.asarray(jax.jit(model.attention)(step, jax.random.key(0)))
    assert attention_maps.shape == (TINY.layers // TINY.time_every, B, TINY.heads, T, T)
    np.testing.assert_allclose(attention_maps.sum(-1), 1, rtol=1e-5)
    t = np.arange(T)
    may = (t <= t[:, None]) & (t > t[:, None] - TINY.context)
    assert ((attention_maps[:, 0] > 0) == may).all()
    assert ((attention_maps[:, 1] > 0) == (may & ((t >= 6) == (t >= 6)[:, None]))).all()


def test_an_imagined_frame_equals_denoising_it_at_the_end_of_the_uncached_window(model, step):
    """The sampler on the cache against the parallel pass over the whole window, K times, past the
    context.
    """
    cfg = model.dynamics.cfg

    @jax.jit
    def both(step):
        z = model.dynamics.packed(model.encoder(step.obs.astype(jnp.float32), step.is_first)[0])
        given = jax.tree.map(lambda x: x[:, :-1], step)
        state, _ = model.prefill(z[:, :-1], given, jnp.ones(B, bool), jax.random.key(0))
        cached = model.denoise(state, step.prev_action[:, -1], jax.random.key(3))
        new = jax.random.normal(
            jax.random.key(3), (B, 1, model.dynamics.tokens, model.dynamics.channels)
        )
        past, labelled = jnp.ones((B, T - 1), int), jnp.ones((B, T), bool)
        for i in range(cfg.sampling_steps):
            signal_level = jnp.concatenate([past * cfg.context_level, jnp.full((B, 1), 2 * i)], 1)
            step_exponent = jnp.concatenate([past * cfg.finest, jnp.full((B, 1), 2)], 1)
            full = jnp.concatenate([z[:, :-1], new], 1)
            x, _, _ = model.dynamics(
                full, signal_level, step_exponent, step.prev_action, labelled, step.is_first
            )
            tau, d = i / 4, 1 / 4
            new = new + (x[:, -1:] - new) / (1 - tau) * d
        return cached, new[:, 0]

    cached, parallel = both(step)
    np.testing.assert_allclose(cached, parallel, atol=1e-5)


def test_predictions_see_no_later_frame_and_nothing_of_another_episode(step):
    model = dynamics()
    z, forward = run(model, step)
    reach = 2 * (TINY.context - 1)  # two time layers
    grad = jax.jit(jax.grad(lambda z, t: (forward(z)[0][:, t] ** 2).sum()))
    for t in (2, 5, 8):
        touched = np.abs(grad(z, t)).sum((2, 3)) > 0
        window = (np.arange(T) <= t) & (np.arange(T) >= t - reach)
        np.testing.assert_array_equal(touched[0], window)
        np.testing.assert_array_equal(touched[1], window & (np.arange(T) >= (6 if t >= 6 else 0)))


def test_agent_tokens_never_change_the_world_and_see_all_of_it(step):
    """Tested by an exactly zero gradient: the agent slot's embedding moves feat and not one number of the
    predictions.
    """
    from reverie.nn.core import build

    params, bind = build(dynamics())
    z, _ = run(bind(params), step)

    def out(slots):
        x, feat, _ = run(bind({**params, 'slots': slots}), step)[1](z)
        return jnp.stack([(x**2).sum(), (feat**2).sum()])

    world, agent = jax.jit(jax.jacrev(out))(params['slots'])
    assert (np.asarray(world)[-1] == 0).all() and (np.abs(world[:-1]).sum(1) > 0).all()
    assert (np.abs(agent).sum(1) > 0).all()
    predict = lambda z, agent: run(bind(params), step, agent=agent)[1](z)[0]
    with_agent, without = jax.jit(lambda z: (predict(z, True), predict(z, False)))(z)
    np.testing.assert_allclose(with_agent, without, atol=1e-6)


def test_the_agent_sees_the_action_that_led_to_its_frame(step):
    model = dynamics()
    z, _ = run(model, step)
    signal_level, step_exponent, yes = (
        jnp.zeros((B, T), int),
        jnp.full((B, T), 3),
        jnp.ones((B, T), bool),
    )
    feat = lambda a: (
        model(z, signal_level, step_exponent, a, yes, step.is_first)[1][:, 3] ** 2
    ).sum()
    touched = np.abs(jax.jit(jax.grad(feat))(step.prev_action)).sum(-1) > 0
    assert touched[:, 1:4].all() and not touched[:, 4:].any()


def test_unlabelled_rows_give_no_gradient_to_action_embeddings_and_labelled_rows_do(step):
    from reverie.nn.core import build

    params, bind = build(dynamics())
    z, _ = run(bind(params), step)
    signal_level, step_exponent = jnp.zeros((B, T), int), jnp.full((B, T), 3)

    def loss(params, labelled):
        x, _, _ = bind(params)(
            z, signal_level, step_exponent, step.prev_action, labelled, step.is_first
        )
        return (x**2).sum()

    grad = jax.jit(jax.grad(loss))
    none, some = (
        grad(params, jnp.zeros((B, T), bool)),
        grad(params, jnp.zeros((B, T), bool).at[0].set(True)),
    )
    assert not np.asarray(none['action']['kernel']).any()
    assert np.asarray(some['action']['kernel']).any()
    assert np.asarray(none['slots'])[
        0
    ].any()  # the learned embedding of the action's slot serves both
    actions = step.prev_action.at[1].set(7.0)  # what an unlabelled row holds does not matter
    same = jax.jit(
        lambda a: bind(params)(
            z,
            signal_level,
            step_exponent,
            a,
            jnp.array([[True], [False]]) & jnp.ones((B, T), bool),
            step.is_first,
        )[0]
    )
    np.testing.assert_array_equal(same(actions), same(step.prev_action))


@pytest.fixture(scope='module')
def prefilled(step):
    z = jax.random.normal(jax.random.key(1), (B, T, 2, 6))
    model = ShortcutModel(dynamics())
    return jax.jit(lambda z: model.prefill(z, step, jnp.ones(B, bool), jax.random.key(0))[0])(z)


@pytest.mark.parametrize('steps', [1, 2, 4, 8])
def test_every_number_of_sampling_steps_gives_a_frame_and_uses_the_cache_only_to_read(
    steps, step, prefilled
):
    model, state = ShortcutModel(dynamics(sampling_steps=steps)), prefilled
    new, pred = jax.jit(model.imagine)(state, step.prev_action[:, 1], jax.random.key(2))
    assert np.isfinite(new.z).all() and pred.feat.shape == (B, TINY.width)
    assert (new.dynamics.pos == T + 1).all()
    changed = [
        int((a != b).any((0, 1, 2, 4)).sum())
        for a, b in zip(new.dynamics.k, state.dynamics.k, strict=True)
    ]
    assert changed == [1] * len(
        changed
    )  # the commit wrote one slot of each time layer, the K passes none


def test_context_noise_changes_what_the_cache_holds_and_what_is_imagined(step):
    z = jax.random.normal(jax.random.key(1), (B, T, 2, 6))
    out = {}
    for noise in (0.0, 0.1):
        model = ShortcutModel(dynamics(context_noise=noise))

        def go(z, key, model=model):
            state, _ = model.prefill(z, step, jnp.ones(B, bool), key)
            return model.denoise(state, step.prev_action[:, 1], jax.random.key(3))

        go = jax.jit(go)
        out[noise] = go(z, jax.random.key(0)), go(z, jax.random.key(9))
    assert float(jnp.abs(out[0.1][0] - out[0.1][1]).max()) > 1e-4  # the draw of the noise matters
    np.testing.assert_array_equal(*out[0.0])


def test_decoding_along_a_dream_equals_decoding_the_whole_dream_at_once(model, step):
    @jax.jit
    def dream(step):
        def observe(state, x):
            state, _ = model.observe(state, x, jax.random.key(0))
            return state, (model.decode(state), state.z)

        def imagine(state, key):
            state, _ = model.imagine(state, step.prev_action[:, 1], key)
            return state, (model.decode(state), state.z)

        major = jax.tree.map(lambda x: x[:, :5].swapaxes(0, 1), step)
        state, seen = jax.lax.scan(observe, model.initial(B), major)
        _, dreamed = jax.lax.scan(imagine, state, jax.random.split(jax.random.key(1), 6))
        image, z = jax.tree.map(lambda a, b: jnp.concatenate([a, b]).swapaxes(0, 1), seen, dreamed)
        first = jnp.zeros((B, 11), bool).at[:, 0].set(True)
        return image, model.decoder(z.reshape(B, 11, 4, 3), first)[0]

    np.testing.assert_allclose(*dream(step), atol=1e-5)


def test_committing_a_frame_in_the_pass_that_begins_the_next_gives_the_same_dream(model, step):
    model = ShortcutModel(dynamics(context_noise=0.1), model.encoder, model.decoder)

    @jax.jit
    def dream(step):
        major = jax.tree.map(lambda x: x[:, :6].swapaxes(0, 1), step)
        observe = lambda state, x: (model.observe(state, x, jax.random.key(0))[0], None)
        start, _ = jax.lax.scan(observe, model.initial(B), major)
        actions = step.prev_action[:, 1:].swapaxes(0, 1)
        keys = jax.random.split(jax.random.key(1), len(actions))

        def apart(state, x):
            state, pred = model.imagine(state, *x)
            return state, (state.z, model.decode(state), pred.feat)

        def fused(pending, x):
            pending, pred = model.imagine_pipelined(pending, *x)
            return pending, (pending.state.z, pending.state.image, pred.feat)

        first, rest = (actions[0], keys[0]), (actions[1:], keys[1:])
        pending = model.denoise_next(start, *first)
        return jax.lax.scan(apart, start, (actions, keys))[1], (
            pending.state.z,
            jax.lax.scan(fused, pending, rest)[1],
        )

    (z, image, feat), (first, (z_fused, image_fused, feat_fused)) = dream(step)
    assert len(z) > CFG.transformer.context  # the ring has turned
    np.testing.assert_allclose(first, z[0], atol=1e-5)
    np.testing.assert_allclose(z_fused, z[1:], atol=1e-4)
    np.testing.assert_allclose(image_fused, image[1:], atol=1e-4)
    np.testing.assert_allclose(feat_fused, feat[:-1], atol=1e-4)  # one frame later


def test_the_end_of_an_observation_can_wait_and_be_taken_back(model, step):
    """Left for later, or undone and done again: the same cache and the same features, across an
    episode's start.
    """
    model = ShortcutModel(dynamics(context_noise=0.1), model.encoder, model.decoder)
    visible = lambda cache: (cache.pos, cache.start, [x for kv in (cache.k, cache.v) for x in kv])

    @jax.jit
    def watch(step):
        def see(state, x):
            x, key = x
            waited, feat_waited = model.commit(model.observe_pending(state, x, key))
            state, feat = model.observe(state, x, key)
            again, feat_again = model.commit(model.uncommit(state, x.prev_action, key))
            feats = jnp.stack([feat, feat_waited.feat, feat_again.feat])
            return state, (feats, [visible(s.dynamics) for s in (state, waited, again)])

        major = jax.tree.map(lambda x: x.swapaxes(0, 1), step)
        return jax.lax.scan(see, model.initial(B), (major, jax.random.split(jax.random.key(0), T)))[
            1
        ]

    feats, caches = watch(step)
    for other in (1, 2):
        np.testing.assert_allclose(feats[:, other], feats[:, 0], atol=1e-5)
        for a, b in zip(jax.tree.leaves(caches[other]), jax.tree.leaves(caches[0]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_row_that_is_held_dreams_on_as_if_nothing_had_happened(model, step):
    """Longer than the context, so that the ring turns over what was left in the slots of the row
    that waited.
    """
    model = ShortcutModel(dynamics(context_noise=0.1), model.encoder, model.decoder)

    @jax.jit
    def dream(step, held):
        state = model.observe(
            model.initial(B), jax.tree.map(lambda x: x[:, 0], step), jax.random.key(0)
        )[0]

        def move(pending, x):
            key, held = x
            new, _ = model.imagine_pipelined(pending, step.prev_action[:, 1], key)
            return model.where_rows(jnp.stack([~held, held]), new, pending), new.state.image[0]

        pending = model.uncommit(state, step.prev_action[:, 0], jax.random.key(0))
        return jax.lax.scan(
            move, pending, (jax.random.split(jax.random.key(1), T)[jnp.cumsum(~held) - 1], held)
        )[1]

    held = jnp.arange(2 * T) % 2 == 0  # the first row moves on every other time
    apart, together = dream(step, held), dream(step, jnp.zeros(2 * T, bool))
    assert 2 * CFG.transformer.context < T
    np.testing.assert_array_equal(apart[1::2], together[:T])


def test_light_weights_give_the_same_numbers_bit_for_bit(step):
    half = dynamics(transformer=dataclasses.replace(TINY, dtype='bfloat16'))
    params, bind = build(half)
    light = cast_kernels(half, params)
    small = [x.dtype == jnp.bfloat16 for x in jax.tree.leaves(light)]
    assert sum(small) > 15 and not all(
        small
    )  # norms, embeddings and the fp32 readout stay as they are
    z, _ = run(half, step)
    forward = jax.jit(lambda params, z: run(bind(params), step)[1](z)[:2])
    for a, b in zip(forward(params, z), forward(light, z), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    'change, word', [({'k_max': 6}, 'k_max=6'), ({'sampling_steps': 16}, 'at most k_max=8')]
)
def test_impossible_grids_are_refused(change, word):
    with pytest.raises(UserError, match=word):
        dataclasses.replace(CFG, **change)
    with pytest.raises(UserError, match='pack=2'):
        Dynamics(CFG, 3, 3, A, nnx.Rngs(0))
