"""A session against the world model and the environment used by hand, and every preset in one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reverie.agents import registry
from reverie.agents.dreamer4 import Dreamer4Config
from reverie.data.episodes import Episodes
from reverie.envs import device
from reverie.nn.dists import symexp_bins
from reverie.serve.contexts import Contexts
from reverie.serve.estimate import flops
from reverie.serve.session import Session
from reverie.types import ActionSpace, Playable, UserError
from tests.serve.conftest import random_params
from tests.small import shrink

CONTEXT = 3


def make(agent, params, env, dataset, **options):
    return Session(
        agent,
        params,
        env,
        Contexts(Episodes(dataset), CONTEXT),
        slots=2,
        context=CONTEXT,
        seed=5,
        **options,
    )


@pytest.fixture(scope='module')
def session(agent, params, env, dataset):
    return make(agent, params, env, dataset)


@pytest.fixture(scope='module')
def whole(agent, params, env, dataset):
    """One that shows frames as `imagine` ends them."""
    return make(agent, params, env, dataset, pipelined=False)


def one_hot(*chosen):
    return np.eye(6, dtype=np.float32)[list(chosen)]


HUMAN, BOTH = np.zeros(2, bool), np.ones(2, bool)


def rounding(agent):
    """Error of a two-hot mean of random weights, whose p is about 1 / bins.

    The mean is a sum of p |bin| with |bin| up to 4.9e8; two programs round each p and each product
    at the last of 24 bits in their own way, and the errors of the largest add up.
    """
    return 2.0**-24 * np.abs(symexp_bins(agent.cfg.bins)).mean()


def snapshot(session):
    return jax.device_get(session.carry)


def same(a, b, rows=slice(None)):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.atleast_1d(x)[rows], np.atleast_1d(y)[rows])


@pytest.mark.parametrize('pipelined', [False, True])
def test_frames_of_a_dream_are_those_of_imagine(session, agent, params, env, pipelined):
    """Early frames are the same ones; there the heads speak, and the agent chooses, one frame
    later.
    """
    model, begun = agent.model(params), session
    session.start(0, 1, 'game'), session.start(1, 2, 'data')
    if not pipelined:
        session = Session(agent, params, env, slots=2, seed=5, pipelined=False)
        session.carry = begun.carry._replace(model=jax.jit(model.commit)(begun.carry.model)[0])
        begun.carry = None  # it will be donated
    assert session.heads_lag('dream') == session.heads_lag(
        'both'
    ) == pipelined and not session.heads_lag('real')
    keys = lambda number: jax.random.split(jax.random.fold_in(jax.random.key(5), number), 3)
    imagine = jax.jit(lambda state, action, number: model.imagine(state, action, keys(number)[0]))

    @jax.jit
    def heads(state, feat, number):
        return agent.choose(params, state, feat, keys(number)[2]), agent.expected_return(
            params, feat
        )

    kept = jax.tree.map(jnp.array, session.carry.model)
    state, said = jax.jit(model.commit)(kept) if pipelined else (kept, None)
    chosen = session.carry.action
    for i, actions in enumerate((one_hot(1, 3), one_hot(0, 0), one_hot(5, 2), one_hot(3, 3))):
        by_agent = np.array(
            [False, i == 2]
        )  # the agent's own choice in the third frame of the second player
        before, number = said, session.frames
        if pipelined:
            (chosen, _), _ = heads(state, before.feat, number)
        taken = jnp.where(by_agent[:, None], chosen, actions)
        frame = session.frame(actions, by_agent, BOTH)
        state, said = imagine(state, taken, number)
        spoken = before if pipelined else said
        (chosen, probs), value = heads(state, spoken.feat, number)
        np.testing.assert_array_equal(frame.action, taken)
        np.testing.assert_allclose(
            np.asarray(frame.image) / 255, np.clip(model.decode(state), 0, 1), atol=0.6 / 255
        )
        np.testing.assert_allclose(frame.cont, spoken.cont, atol=1e-5, rtol=1e-6)
        np.testing.assert_allclose(frame.reward, spoken.reward, rtol=0, atol=rounding(agent))
        np.testing.assert_allclose(frame.value, value, rtol=0, atol=rounding(agent))
        np.testing.assert_allclose(frame.probs, probs, atol=1e-5)
        np.testing.assert_allclose(np.sum(frame.probs, -1), 1, atol=1e-5)


def test_the_real_game_is_the_environment_stepped_by_hand(session, env):
    session.start(0, 7, 'game', real=True), session.start(1, 8, 'game', real=True)
    state = jax.tree.map(jnp.array, session.carry.env)
    vector = device.Vector(env, 2)
    step = jax.jit(vector.step)
    for view in ('real', 'both', 'real'):
        _, key, _ = jax.random.split(jax.random.fold_in(jax.random.key(5), session.frames), 3)
        frame = session.frame(one_hot(1, 3), HUMAN, BOTH, view)
        state, arrived = step(state, jnp.array([1, 3]), key)
        seen = frame.real if view == 'both' else frame.image
        np.testing.assert_array_equal(seen, 255 * np.asarray(arrived.obs))
        if view == 'real':
            np.testing.assert_array_equal(frame.reward, arrived.reward)
            np.testing.assert_array_equal(frame.is_last, arrived.is_last)


def test_a_start_is_the_same_whenever_and_wherever_it_is_asked_for(session):
    first = session.start(0, 11, 'game')
    row = snapshot(session)
    session.frame(one_hot(1, 2), HUMAN, BOTH)
    again, real = session.start(1, 11, 'game'), session.start(1, 11, 'game', real=True)
    other = session.start(0, 12, 'game')
    np.testing.assert_array_equal(first.image, again.image)
    same(jax.tree.map(lambda x: x[:1], row), jax.tree.map(lambda x: x[1:], snapshot(session)))
    np.testing.assert_array_equal(
        first.probs, real.probs
    )  # dream and reality begin in the same state of mind
    assert set(np.unique(real.image)) <= {0, 255}
    assert (np.asarray(other.probs) != np.asarray(first.probs)).any()


def test_who_does_not_move_stays_and_nobody_feels_the_others(session):
    def play(other):
        session.start(0, 1, 'game'), session.start(1, other, 'game')
        session.frames = 100  # the same draws
        frame = session.frame(one_hot(1, other % 6), HUMAN, BOTH)
        return jax.tree.map(lambda x: x[0], jax.device_get((session.carry, frame)))

    for a, b in zip(jax.tree.leaves(play(2)), jax.tree.leaves(play(3)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    undisturbed, waited = ([], [])
    for seen, waits in ((undisturbed, 0), (waited, 3)):
        session.start(0, 1, 'game'), session.start(1, 2, 'game')
        session.frames = 200
        for _ in range(waits):
            session.frame(one_hot(1, 1), HUMAN, np.array([False, True]))
        session.frames = 200
        seen += [jax.device_get(session.frame(one_hot(1, 1), HUMAN, BOTH)) for _ in range(6)]
    for a, b in zip(undisturbed, waited, strict=True):
        np.testing.assert_array_equal(a.image[0], b.image[0])
        np.testing.assert_array_equal(a.probs[0], b.probs[0])
    assert any((a.image[1] != b.image[1]).any() for a, b in zip(undisturbed, waited, strict=True))


def test_hundreds_of_frames_and_new_players_compile_nothing_and_keep_every_shape(session):
    (
        session.start(0, 0, 'game'),
        session.start(1, 0, 'data'),
        session.frame(one_hot(0, 0), BOTH, BOTH),
    )
    shapes, programs = jax.tree.map(np.shape, session.carry), set(session._programs)
    for i in range(300):
        if i % 50 == 0:
            session.start(i // 50 % 2, i, ('game', 'data')[i // 100 % 2])
        frame = session.frame(one_hot(0, 0), BOTH, np.array([True, i % 3 > 0]))
    assert jax.tree.map(np.shape, session.carry) == shapes and set(session._programs) == programs
    assert np.isfinite(frame.value).all() and int(session.carry.model.state.dynamics.pos[0]) > 100


def test_other_sampling_steps_are_another_program_for_the_same_state(session):
    assert session.steps_choices == (1, 2, 4) and session.steps == 4
    session.start(0, 1, 'game'), session.start(1, 1, 'game')
    assert not session.ready('dream', 1)
    one, four = session.trace('dream', 1), session.trace('dream', 4)
    assert jax.tree.map(jnp.shape, one.out_info) == jax.tree.map(jnp.shape, four.out_info)
    assert flops(four.jaxpr) > 1.5 * flops(one.jaxpr)
    with pytest.raises(UserError, match='3 sampling steps'):
        session.frame(one_hot(0, 0), HUMAN, BOTH, 'dream', 3)


def test_weights_are_kept_as_light_as_they_are_multiplied(session, agent, params, env):
    """Norms, embeddings and outputs keep fp32, and groups that play does not need are left out."""
    assert 'prior' in params and 'prior' not in session.params  # all in fp32: nothing else changes
    same(session.params, {name: params[name] for name in session.params})
    agent = registry.make(in_bfloat16(registry.dreamer4_debug()), env.spec)
    light = Session(agent, jax.eval_shape(agent.init, jax.random.key(0)), env, slots=2).params
    assert light['dynamics']['blocks']['layers'][0]['mlp']['up']['kernel'].dtype == jnp.bfloat16
    assert (
        light['dynamics']['readout']['kernel'].dtype
        == light['dynamics']['slots'].dtype
        == jnp.float32
    )


@pytest.mark.parametrize('name', ['dreamer4_debug', 'dreamer_v3'])
def test_light_weights_dream_the_same_bit_for_bit(name, env):
    agent = registry.make(in_bfloat16(tiny(registry.get(name))), env.spec)
    params = random_params(agent)
    light = agent.for_inference(params)
    halved = [x.dtype == jnp.bfloat16 for x in jax.tree.leaves(light)]
    assert sum(halved) > 10 and not all(halved)

    @jax.jit
    def dream(params):
        model = agent.model(params)
        state, said = model.imagine(model.initial(2), jnp.asarray(one_hot(1, 3)), jax.random.key(2))
        return model.decode(state), said, agent.choose(params, state, said.feat, jax.random.key(3))

    same(dream(params), dream(light))


def in_bfloat16(config):
    """Every style in it."""
    if not dataclasses.is_dataclass(config):
        return config
    fields = {f.name: in_bfloat16(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if 'dtype' in fields:
        fields['dtype'] = 'bfloat16'
    return dataclasses.replace(config, **fields)


def test_recorded_starts_are_windows_of_the_dataset(dataset):
    episodes = Episodes(dataset)
    contexts = Contexts(episodes, CONTEXT)
    windows = set()
    for record in episodes.records():
        bits = np.unpackbits(record.obs, axis=-1)[:, :400].reshape(-1, 10, 10, 4)
        windows |= {
            bits[i : i + CONTEXT].astype(bool).tobytes() for i in range(len(bits) - CONTEXT + 1)
        }
    drawn = [contexts(number) for number in range(12)]
    assert all(np.asarray(step.obs)[0].tobytes() in windows for step in drawn)
    assert len({np.asarray(step.obs).tobytes() for step in drawn}) > 6
    np.testing.assert_array_equal(contexts(3).obs, drawn[3].obs)


def test_a_session_without_anything_to_begin_from_is_refused(agent, params, env):
    with pytest.raises(UserError, match='environment or recordings'):
        Session(agent, params)
    with pytest.raises(UserError, match='0 players'):
        Session(agent, params, env, slots=0)
    with pytest.raises(UserError, match='no player has begun'):
        Session(agent, params, env).frame(one_hot(0), HUMAN[:1], BOTH[:1])


def test_counted_operations_are_those_of_the_products():
    def f(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0] @ w

    assert flops(jax.make_jaxpr(f)(np.ones((3, 4)), np.ones((4, 4)))) == 6 * 2 * 3 * 4 * 4
    either = lambda x: jax.lax.cond(x.sum() > 0, lambda: x @ x @ x, lambda: x @ x)
    counted = jax.make_jaxpr(either)(np.ones((3, 3)))
    assert (flops(counted), flops(counted, min)) == (108, 54)
    conv = lambda x, k: jax.lax.conv(x, k, (1, 1), 'VALID')
    assert (
        flops(jax.make_jaxpr(conv)(np.ones((1, 3, 6, 6)), np.ones((5, 3, 2, 2))))
        == 2 * 5 * 25 * 3 * 4
    )


def tiny(config):
    """A preset with its own structure and next to no weights."""
    if not isinstance(config, Dreamer4Config):
        return shrink(config)
    small = dict(
        width=16,
        heads=2,
        kv_heads=1,
        head_dim=8,
        layers=2,
        time_every=2,
        context=4,
        dtype='float32',
    )
    shrunk = lambda part: dataclasses.replace(
        part, transformer=dataclasses.replace(part.transformer, **small)
    )
    return dataclasses.replace(
        config, tokenizer=shrunk(config.tokenizer), dynamics=shrunk(config.dynamics), head_units=16
    )


ALIKE = (
    'dreamer4',
    'dreamer4_demo',
    'dreamer_v3',
    'dreamer_v3_release',
)  # to the debug presets, but for numbers


# behaviour cloning has no dream, these take images of their size
IMAGES = ('dreamer4_paper', 'dreamer4_image')
DREAMS = [n for n in registry.PRESETS if not n.startswith(('bc', *IMAGES))]


@pytest.mark.parametrize('name', DREAMS)
def test_every_preset_can_be_played_in_its_dream_and_in_the_real_game(name, session):
    """Two frames of dream and game side by side; starts and the game alone are traced, as are
    presets `ALIKE`.
    """
    if name != 'dreamer4_debug':
        env = device.make('control/pendulum' if name.startswith('planet') else 'minatar/breakout')
        agent = registry.make(tiny(registry.get(name)), env.spec)
        session = Session(agent, random_params(agent), env, context=2)
    agent, n = session.agent, session.slots
    assert isinstance(agent, Playable)
    space: ActionSpace = agent.spec.actions
    start = jax.eval_shape(session.starts.from_game, session.params, jax.random.key(0))[1]
    real, both = (session.trace(view).out_info[1] for view in ('real', 'both'))
    assert real.image.shape == both.image.shape == both.real.shape == (n, *start.image.shape[1:])
    assert (both.value is None) == (name.startswith('planet'))
    assert (both.probs is None) == (space.kind == 'continuous')
    if name in ALIKE:
        return
    session.carry = session.carry or jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), session._shape
    )
    yes, action = np.ones(n, bool), np.zeros((n, space.size), np.float32)
    action[:, 0] = 1.0
    for by_agent in (~yes, yes):
        frame = session.frame(action, by_agent, yes, 'both')
        assert all(np.isfinite(x).all() for x in (frame.reward, frame.cont))
        if not by_agent.all():
            np.testing.assert_array_equal(frame.action, action)
