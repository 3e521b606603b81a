"""The agent's losses: who learns from which row, targets without off-by-one, every phase learns one
batch.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from reverie.agents import registry
from reverie.agents.bc import BC
from reverie.agents.dreamer4 import Dreamer4
from reverie.agents.dreamer4 import agent as agent_module
from reverie.agents.dreamer4 import losses as functions
from reverie.agents.dreamer4.losses import discounted, multi_token_targets, single_images
from reverie.commands.experiment import saved
from reverie.models.tokenizer import draw_mask
from reverie.nn import lpips
from reverie.types import ActionSpace, Batch, Component, EnvSpec, Step, UserError

SPEC = EnvSpec('toy', (10, 10, 2), ActionSpace('discrete', 3))
B, T = 4, 6


def phase_loss(agent, params, name, batch, seed, step):
    """-> (losses, metrics) of a function of `dreamer4.losses`."""
    function = getattr(functions, name)
    key = jax.random.key(seed)
    return function(agent.networks(params), batch, key, agent.cfg, jnp.int32(step))


@pytest.fixture(scope='module')
def agent():
    config = registry.dreamer4_debug()
    deeper = lambda part: dataclasses.replace(
        part, transformer=dataclasses.replace(part.transformer, layers=3)
    )
    config = dataclasses.replace(
        config, tokenizer=deeper(config.tokenizer), dynamics=deeper(config.dynamics)
    )
    return registry.make(config, SPEC)


@pytest.fixture(scope='module')
def params(agent):
    params = agent.init(jax.random.key(0))
    # output layers that start at zero would hide gradients
    normal = lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32)
    return jax.tree.map(lambda x: x + 0.05 * normal(x), params)


@pytest.fixture(scope='module')
def batch():
    key = jax.random.key(1)
    first = jnp.zeros((B, T), bool).at[:, 0].set(True).at[2, 3].set(True)
    last = jnp.zeros((B, T), bool).at[2, 2].set(True)
    action = jax.nn.one_hot(jax.random.randint(key, (B, T), 0, 3), 3) * ~first[..., None]
    reward = jax.random.bernoulli(key, 0.4, (B, T)) * ~first * 1.0
    row = (
        3 * jnp.arange(B)[:, None] + jnp.arange(T)
    ) % 10  # one lit row, one lit column: few frames, all different
    lit = lambda n: jnp.broadcast_to(jnp.arange(10) == n[..., None, None], (B, T, 10, 10))
    obs = jnp.stack([lit(row), lit(7 * row % 10).swapaxes(2, 3)], -1)
    step = Step(obs, action, reward, first, last, last)
    yes = jnp.ones(B, bool)
    return Batch(step, yes, yes, jnp.arange(B) < B // 2)


@pytest.fixture(scope='module')
def finetune(agent):
    """Gradient of one loss term, or of all, with respect to all parameters."""

    def total(params, batch, weights):
        losses, _ = phase_loss(agent, params, 'finetune_loss', batch, 3, 9)
        return sum(weights[name] * x.mean() for name, x in losses.items())

    return jax.jit(jax.grad(total))


ONLY = {
    name: dict(shortcut=0.0, policy=0.0, reward=0.0, cont=0.0) | {name: 1.0}
    for name in ('shortcut', 'policy')
}


def touched(grads) -> bool:
    return any(np.abs(np.asarray(x)).max() > 0 for x in jax.tree.leaves(grads))


def test_policy_learns_from_relevant_rows_only_and_dynamics_from_the_others_only(
    finetune, params, batch
):
    as_rows = lambda relevant: batch._replace(relevant=jnp.full(B, relevant))
    assert touched(finetune(params, as_rows(True), ONLY['policy']))
    assert not touched(finetune(params, as_rows(False), ONLY['policy']))
    assert touched(finetune(params, as_rows(False), ONLY['shortcut']))
    assert not touched(finetune(params, as_rows(True), ONLY['shortcut']))


def test_changing_the_actions_of_uniform_rows_leaves_the_policy_loss_of_others_alone(
    agent, params, batch
):
    loss = jax.jit(lambda b: phase_loss(agent, params, 'finetune_loss', b, 3, 9)[0])
    other = batch._replace(
        step=batch.step._replace(reward=batch.step.reward.at[B // 2 :].add(1.0)),
        has_reward=jnp.arange(B) < B // 2,
    )
    a, b = loss(batch._replace(has_reward=other.has_reward)), loss(other)
    np.testing.assert_array_equal(
        a['reward'], b['reward']
    )  # rows without rewards: their numbers do not matter
    rows = np.asarray(a['policy']).any(1)
    assert rows.sum() == B // 2 and (np.asarray(a['shortcut']).any(1) == ~rows).all()


def test_multi_token_targets_are_the_action_chosen_at_t_and_stop_at_the_episode(batch):
    step = jax.tree.map(np.asarray, batch.step)
    action, valid = multi_token_targets(batch.step.prev_action, batch.step.is_first, 1, 3)
    reward, reward_valid = multi_token_targets(batch.step.reward, batch.step.is_first, 0, 3)
    for b in range(B):
        for t in range(T):
            for n in range(3):
                i = t + 1 + n  # the action chosen at t + n arrives one step later
                same = i < T and not step.is_first[b, t + 1 : i + 1].any()
                assert bool(valid[n, b, t]) == same
                if same:
                    np.testing.assert_array_equal(action[n, b, t], step.prev_action[b, i])
                j = t + n
                same = j < T and not step.is_first[b, t + 1 : j + 1].any()
                assert bool(reward_valid[n, b, t]) == same
                if same:
                    assert float(reward[n, b, t]) == step.reward[b, j]


def test_the_clone_target_cannot_be_read_off_the_input(agent, params, batch):
    """feat[t] never depends on the action chosen at t (which arrives at t + 1)."""

    def feat_sum(action, t):
        moved = batch._replace(step=batch.step._replace(prev_action=action))
        _, feat, _ = phase_loss(agent, params, 'shortcut_forcing', moved, 0, 9)
        return jnp.where(jnp.arange(T)[:, None] == t, feat**2, 0).sum()

    grad = jax.jit(jax.grad(feat_sum))
    for t in (1, 3):
        seen = np.abs(grad(batch.step.prev_action, t)).sum((0, 2)) > 0
        assert seen[t] and not seen[t + 1 :].any()


def test_imagination_moves_policy_and_value_and_nothing_else(agent, params, batch):
    def total(params):
        losses, _ = phase_loss(agent, params, 'imagination_loss', batch, 3, 0)
        assert all(x.shape == (B, agent.cfg.horizon) for x in losses.values())
        return sum(x.mean() for x in losses.values())

    grads = jax.jit(jax.grad(total))(params)
    assert {name for name, g in grads.items() if touched(g)} == {'policy', 'value'}


def test_a_context_that_has_ended_teaches_nothing(agent, params, batch):
    over = batch.step._replace(is_last=batch.step.is_last.at[:, -1].set(True))
    losses, _ = jax.jit(
        lambda p: phase_loss(agent, p, 'imagination_loss', batch._replace(step=over), 3, 0)
    )(params)
    assert all(not np.asarray(x).any() for x in losses.values())


# Losses on one batch of four rows that a working learner passes with room to spare and an idle one
# never reaches.
OVERFIT = {
    'tokenizer': {'recon': 0.06},
    'dynamics': {'shortcut': 0.03},
    'finetune': {'policy': 0.35, 'reward': 0.6, 'cont': 0.05},
    'bc': {'policy': 0.2},
}


@pytest.mark.parametrize('name', OVERFIT)
def test_overfitting_one_batch_drives_each_loss_below_its_bound(agent, params, batch, name):
    if name == 'bc':
        agent = BC(registry.bc_debug(), SPEC)
        params = agent.init(jax.random.key(0))
    phase = next(p for p in agent.phases if p.name == name)
    tx = optax.adam(5e-3)
    relevant = jnp.ones(B, bool) if name == 'bc' else batch.relevant

    def total(trained, key, i):
        losses, _ = phase.loss({**params, **trained}, batch._replace(relevant=relevant), key, i)
        means = {k: x.mean() for k, x in losses.items()}
        return sum(means.values()), means

    @jax.jit
    def fit(trained):
        def step(carry, i):
            trained, opt = carry
            key = jax.random.fold_in(jax.random.key(0), i)
            grads, means = jax.grad(total, has_aux=True)(trained, key, i)
            updates, opt = tx.update(grads, opt)
            return (optax.apply_updates(trained, updates), opt), means

        return jax.lax.scan(step, (trained, tx.init(trained)), jnp.arange(600))[1]

    means = fit({group: params[group] for group in phase.trains})
    for loss, bound in OVERFIT[name].items():
        assert float(means[loss][-50:].mean()) < bound < float(means[loss][:5].mean())


def test_video_of_bytes_is_learnt_as_a_picture_between_black_and_white():
    """One moving square of two brightnesses, uint8: reconstruction far better than the mean
    picture's, in PSNR of pictures.
    """
    shade, ground = 220, 30
    video = np.full((4, 8, 10, 10, 2), ground, np.uint8)
    for row, t in np.ndindex(4, 8):
        video[row, t, t : t + 3, 2 * row : 2 * row + 3] = shade
    config = registry.dreamer4_debug()
    pixels = video / np.float32(255)
    measured = dict(pixel_mean=float(pixels.mean()), pixel_std=float(pixels.std()))
    part = dataclasses.replace(config.tokenizer, readout_scale=0.1, **measured)
    agent = Dreamer4(dataclasses.replace(config, tokenizer=part), SPEC)
    (tokenizer, *_) = agent.phases
    params = agent.init(jax.random.key(0))
    yes = jnp.ones(4, bool)
    zeros = jnp.zeros((4, 8))
    first = jnp.zeros((4, 8), bool).at[:, 0].set(True)
    last = jnp.zeros((4, 8), bool)
    step = Step(jnp.asarray(video), jnp.zeros((4, 8, 3)), zeros, first, last, last)
    batch = Batch(step, yes, yes, yes)
    tx = optax.adam(5e-3)

    def total(trained, key):
        losses, _ = tokenizer.loss({**params, **trained}, batch, key, jnp.zeros((), jnp.int32))
        return losses['recon'].mean()

    @jax.jit
    def fit(trained):
        def update(carry, i):
            trained, opt = carry
            loss, grads = jax.value_and_grad(total)(
                trained, jax.random.fold_in(jax.random.key(0), i)
            )
            updates, opt = tx.update(grads, opt)
            return (optax.apply_updates(trained, updates), opt), loss

        return jax.lax.scan(update, (trained, tx.init(trained)), jnp.arange(300))

    (trained, _), losses = fit({group: params[group] for group in tokenizer.trains})
    assert float(losses[0]) < 10.0, 'errors of pictures in [0, 1], not of bytes'
    net = agent.networks({**params, **trained})
    seen = net.decoder(net.encoder(step.obs, first)[0], first)[0]
    truth = video / np.float32(255)
    noise = lambda picture: np.mean((np.asarray(picture) - truth) ** 2)
    assert -10 * np.log10(noise(seen)) > -10 * np.log10(noise(truth.mean((0, 1)))) + 6


def test_environments_that_dreamer4_cannot_take_are_refused():
    config = registry.dreamer4_debug()
    with pytest.raises(UserError, match=r'shape \(4,\)'):
        Dreamer4(config, dataclasses.replace(SPEC, obs_shape=(4,)))


def test_without_a_policy_it_is_a_world_model_alone():
    config = dataclasses.replace(registry.dreamer4_debug(), policy=False)
    agent = Dreamer4(config, SPEC)
    assert [phase.name for phase in agent.phases] == ['tokenizer', 'dynamics']
    assert set(agent.init(jax.random.key(0))) == {'encoder', 'decoder', 'dynamics'}
    assert not agent.readouts and SPEC.actions.kind == 'discrete'


def test_heads_learn_rewards_and_ends_from_uniform_rows_alone(agent, params, batch):
    """Relevant rows are drawn around rewards: what they hold must not reach the heads."""
    half = jnp.arange(B) < B // 2
    batch = batch._replace(relevant=half)
    loss = jax.jit(lambda batch: phase_loss(agent, params, 'finetune_loss', batch, 1, 9)[0])
    step = batch.step
    rewards = lambda rows: step._replace(reward=step.reward + 5.0 * rows[:, None])
    ends = lambda rows: step._replace(is_terminal=step.is_terminal ^ rows[:, None])
    seen = loss(batch)
    for name, change in (('reward', rewards), ('cont', ends)):
        relevant, uniform = (
            loss(batch._replace(step=change(rows)))[name].sum() for rows in (half, ~half)
        )
        np.testing.assert_allclose(relevant, seen[name].sum(), rtol=1e-6)
        assert abs(float(uniform - seen[name].sum())) > 1.0


def test_boolean_grids_are_reconstructed_by_a_cross_entropy_and_decoded_as_probabilities(batch):
    config = registry.dreamer4_debug()
    config = dataclasses.replace(
        config, tokenizer=dataclasses.replace(config.tokenizer, pixels='bernoulli')
    )
    agent = Dreamer4(config, SPEC)
    params = agent.init(jax.random.key(0))
    seen = batch._replace(step=batch.step._replace(obs=batch.step.obs > 0.5))
    losses, _ = phase_loss(agent, params, 'tokenizer_loss', seen, 2, 0)
    key_mask, key_single = jax.random.split(jax.random.key(2))
    net = agent.networks(params)
    encoder, decoder = net.encoder, net.decoder
    hidden = draw_mask(key_mask, (B, T), encoder.patches, config.tokenizer.max_mask_rate).hidden
    is_first = single_images(seen.step.is_first, key_single, config)
    z, _ = encoder(seen.step.obs.astype(jnp.float32), is_first, hidden)
    p, truth = np.asarray(decoder(z, is_first)[0], np.float64), np.asarray(seen.step.obs)
    assert p.min() > 0 and p.max() < 1
    entropy = -np.where(truth, np.log(p), np.log1p(-p)).mean((-3, -2, -1))
    np.testing.assert_allclose(losses['recon'], entropy, rtol=1e-4)
    with pytest.raises(UserError, match='uint8'):
        other = seen._replace(step=seen.step._replace(obs=seen.step.obs.astype(jnp.uint8)))
        phase_loss(agent, params, 'tokenizer_loss', other, 2, 0)


def test_the_dreamed_return_is_the_discounted_sum_of_what_is_still_alive():
    rng = np.random.default_rng(0)
    reward, cont = rng.normal(size=(5, 3)), rng.uniform(size=(5, 3))
    expected, alive = np.zeros(3), np.ones(3)
    for t in range(5):
        expected += alive * reward[t]
        alive *= 0.9 * cont[t]
    np.testing.assert_allclose(
        discounted(jnp.asarray(reward), jnp.asarray(cont), 0.9), expected, rtol=1e-5
    )


def test_a_finetuning_without_uniform_rows_is_refused():
    config = registry.dreamer4_debug()
    phase = dataclasses.replace(config.finetune_phase, relevant=1.0)
    with pytest.raises(UserError, match=r'finetune_phase.relevant=1'):
        Dreamer4(dataclasses.replace(config, finetune_phase=phase), SPEC)


CAMERA = ActionSpace.composite(
    [Component('move', ('back', 'none', 'forward'), rest=1.0), Component('turn', (), -10.0, 10.0)]
)


@pytest.mark.whole
@pytest.mark.parametrize('space', [CAMERA, ActionSpace.composite(()), ActionSpace('continuous', 2)])
def test_where_no_policy_can_act_the_agent_is_a_world_model_alone(batch, space):
    spec = dataclasses.replace(SPEC, actions=space)
    agent = Dreamer4(registry.dreamer4_debug(), spec)
    assert [phase.name for phase in agent.phases] == ['tokenizer', 'dynamics']
    assert not agent.readouts
    params = agent.init(jax.random.key(0))
    assert set(params) == {'encoder', 'decoder', 'dynamics'}
    action = jax.vmap(lambda key: space.sample(key, T))(jax.random.split(jax.random.key(0), B))
    labelled = batch._replace(step=batch.step._replace(prev_action=action))
    losses, _ = phase_loss(agent, params, 'dynamics_loss', labelled, 1, 9)
    assert jnp.isfinite(losses['shortcut']).all()
    model = agent.model(params)
    state = model.initial(B)
    step = jax.tree.map(lambda x: x[:, 0], labelled.step)
    state, _ = model.observe(state, step, jax.random.key(2))
    state, said = model.imagine(state, action[:, 1], jax.random.key(3))
    assert model.decode(state).shape == (B, 10, 10, 2)
    assert (said.reward == 0).all() and (said.cont == 1).all()
    chosen, probs = agent.choose(params, state, said.feat, jax.random.key(4))
    assert chosen.shape == (B, space.size) and not chosen.any() and probs is None
    assert agent.expected_return(params, said.feat) is None
    with pytest.raises(UserError, match=f'toy has {space.kind} actions; bc takes discrete ones'):
        BC(registry.bc_debug(), spec)


def test_parts_of_an_action_are_summed_into_its_token_and_one_that_is_not_known_adds_nothing():
    agent = Dreamer4(registry.dreamer4_debug(), dataclasses.replace(SPEC, actions=CAMERA))
    dynamics = agent.networks(agent.init(jax.random.key(0))).dynamics
    embed = lambda *values: dynamics.action(CAMERA.vector(jnp.array(values)))
    both, move, turn = embed(2.0, 0.5), embed(2.0, 0.0), embed(-1.0, 0.5)
    np.testing.assert_allclose(both, move + turn, atol=1e-6)
    assert not embed(-1.0, 0.0).any()
    # as large as the slots beside it, however many actions there are
    for actions in (3, 300):
        space = ActionSpace('discrete', actions)
        other = Dreamer4(registry.dreamer4_debug(), dataclasses.replace(SPEC, actions=space))
        kernel = other.init(jax.random.key(0))['dynamics']['action']['kernel']
        assert kernel.std() == pytest.approx(0.5, rel=0.01)


@pytest.mark.whole
def test_only_the_agent_token_is_told_the_task(batch):
    spec = dataclasses.replace(SPEC, tasks=('left', 'right'))
    agent = Dreamer4(registry.dreamer4_debug(), spec)
    params = agent.init(jax.random.key(0))
    dynamics = agent.networks(params).dynamics
    z = jax.random.normal(jax.random.key(1), (B, T, dynamics.tokens, dynamics.channels))
    level = jnp.zeros((B, T), jnp.int32)
    labelled = jnp.ones((B, T), bool)
    step = batch.step
    outputs = [
        dynamics(z, level, level, step.prev_action, labelled, step.is_first, task=jnp.full(B, task))
        for task in (0, 1)
    ]
    np.testing.assert_array_equal(outputs[0][0], outputs[1][0])
    assert jnp.abs(outputs[0][1] - outputs[1][1]).min(-1).max() > 1e-4
    feats = [
        agent.with_task(task)
        .model(params)
        .observe(
            agent.model(params).initial(B), jax.tree.map(lambda x: x[:, 0], step), jax.random.key(2)
        )[1]
        for task in (0, 1)
    ]
    assert (feats[0] != feats[1]).any()
    told = batch._replace(task=jnp.array([0, 1, 0, 1]))
    for name in ('dynamics_loss', 'finetune_loss', 'imagination_loss'):
        losses, _ = phase_loss(agent, params, name, told, 1, 9)
        assert all(jnp.isfinite(x).all() for x in losses.values())


@pytest.mark.whole
def test_lpips_is_a_term_of_the_tokenizer_whose_weights_are_no_constants(monkeypatch):
    rng = np.random.default_rng(0)
    shapes = ((11, 11, 3, 4), (5, 5, 4, 4), (3, 3, 4, 4), (3, 3, 4, 4), (3, 3, 4, 4))
    weights = lpips.Params(
        tuple(jnp.asarray(0.1 * rng.normal(size=s), jnp.float32) for s in shapes),
        tuple(jnp.zeros(4) for _ in shapes),
        tuple(jnp.ones(4) for _ in shapes),
    )
    monkeypatch.setattr('reverie.agents.dreamer4.agent.weights', lambda net: weights)
    agent_module._perceptual.cache_clear()
    spec = EnvSpec('video', (16, 16, 3), ActionSpace('discrete', 3))
    cfg = dataclasses.replace(registry.dreamer4_debug(), perceptual='alex')
    cfg = dataclasses.replace(
        cfg, tokenizer=dataclasses.replace(cfg.tokenizer, patch=(8, 8), latents=4)
    )
    assert saved.restore(cfg, json.loads(json.dumps(dataclasses.asdict(cfg)))) == cfg
    agent = Dreamer4(cfg, spec)
    phase = agent.phases[0]
    assert phase.scales == {'recon': 1.0, 'lpips': 0.2} and phase.fixed() == {'lpips': weights}
    params = agent.init(jax.random.key(0))
    obs = jnp.asarray(rng.integers(0, 256, (B, T, 16, 16, 3)), jnp.uint8)
    first = jnp.zeros((B, T), bool).at[:, 0].set(True)
    zero, yes = jnp.zeros((B, T)), jnp.ones(B, bool)
    step = Step(obs, jnp.zeros((B, T, 3)), zero, first, ~first & False, ~first & False)
    video = Batch(step, yes, yes, yes)

    def term(decoder, fixed):
        groups = {**params, 'decoder': decoder, **fixed}
        return phase.loss(groups, video, jax.random.key(1), jnp.int32(0))[0]['lpips'].mean()

    value, grad = jax.value_and_grad(term)(params['decoder'], phase.fixed())
    assert value > 0
    assert max(jnp.abs(x).max() for x in jax.tree.leaves(grad)) > 0
    constants = jax.make_jaxpr(term)(params['decoder'], phase.fixed()).consts
    assert not {np.shape(c) for c in constants} & set(shapes)
