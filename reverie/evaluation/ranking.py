"""Whether a dream ranks policies as the game does: dreamed against real return.

Policies of all strengths begin at the same moments of play, in the game and in the dream of it. A
world model that is fit to choose between policies, which is what imagination training does with
it, orders them as the game does.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from reverie.evaluation.starts import Starts, starts
from reverie.evaluation.statistics import LEVEL, of_runs
from reverie.objectives.behavior import rollout
from reverie.types import Actor, Env, Params, Policy, State, Step, WorldModel

STARTS = 64  # at least
STEPS = 100
SPANS = ((1, 8), (9, 16), (17, 32), (33, 64), (65, 100))  # first and last step
EPISODES = 4  # real ones from each start; chance differs
RESAMPLES = 1000


class Player(NamedTuple):
    """A policy that plays in the game and in dreams of it."""

    name: str
    actor: Actor
    """Plays the game."""
    weights: Callable[[Params], Params]
    """Weights of the world model and its heads -> the actor's."""
    policy: Callable[[WorldModel, Params, bool | Array], Policy]
    """(World model, the actor's weights, greedy) -> how it acts in a dream; hashable."""
    greedy: bool = False


@dataclasses.dataclass(frozen=True)
class OnFrames:
    """Policy in dreams of boolean grids of an actor without memory, which sees decoded frames."""

    actor: Actor
    actions: int
    """A, width of an action vector."""

    def __call__(self, model: WorldModel, weights: Params, greedy: bool | Array) -> Policy:
        def policy(state: State, feat: Array, key: PRNGKeyArray) -> Array:
            none, no = jnp.zeros(len(feat)), jnp.zeros(len(feat), bool)
            frame = model.decode(state) > 0.5
            step = Step(frame, jnp.zeros((len(feat), self.actions)), none, no, no, no)
            _, action = self.actor.act(weights, (), step, key, greedy)
            return jax.nn.one_hot(action, self.actions)

        return policy

    def player(self, name: str, weights: Params) -> Player:
        return Player(name, self.actor, lambda params: weights, self)


class Course(NamedTuple):
    """Rewards and survival along `STEPS` steps of play; expectations in a dream."""

    reward: Float[Array, 'H N']
    """0 after the end of the episode."""
    on: Float[Array, 'H N']
    """Whether the episode goes on after the step."""

    def total(self, discount: float) -> Float[Array, ' N']:
        """Sum of the discounted rewards."""
        return jnp.tensordot(discount ** jnp.arange(len(self.reward)), self.reward, 1)


def real_course(
    env: Env, actor: Actor, params: Params, begin: Starts, key: PRNGKeyArray, greedy: bool | Array
) -> Course:
    """Play on in the game, from starts whose frames the actor has seen; traced."""
    key_see, key_play = jax.random.split(key)
    time_major: Step = jax.tree.map(lambda x: x.swapaxes(0, 1), begin.step)

    def see(memory: PyTree, x: tuple[Step, PRNGKeyArray]) -> tuple[PyTree, None]:
        return actor.act(params, memory, *x, greedy)[0], None

    keys = jax.random.split(key_see, len(time_major.reward))
    before = jax.tree.map(lambda x: x[:-1], (time_major, keys))
    memory, _ = jax.lax.scan(see, actor.initial(params, len(begin.alive)), before)

    def move(carry: Any, key: PRNGKeyArray) -> tuple[Any, Course]:
        state, memory, step, on = carry
        key_act, key_env = jax.random.split(key)
        memory, action = actor.act(params, memory, step, key_act, greedy)
        state, step = jax.vmap(env.step)(state, action, jax.random.split(key_env, len(on)))
        after = on * ~step.is_last
        return (state, memory, step, after), Course(on * step.reward, after)

    newest = jax.tree.map(lambda x: x[-1], time_major)
    carry = (begin.env, memory, newest, begin.alive.astype(jnp.float32))
    course: Course = jax.lax.scan(move, carry, jax.random.split(key_play, STEPS))[1]
    return course


def dreamed_course(model: WorldModel, policy: Policy, begin: Starts, key: PRNGKeyArray) -> Course:
    """Dream on from the frames of the starts: a reward counts as much as the dream says that the
    episode is still on; traced.
    """
    key_see, key_dream = jax.random.split(key)
    time_major: Step = jax.tree.map(lambda x: x.swapaxes(0, 1), begin.step)
    keys = jax.random.split(key_see, len(time_major.reward))
    state, feat = jax.lax.scan(
        lambda state, x: model.observe(state, *x),
        model.initial(len(begin.alive)),
        (time_major, keys),
    )
    _, _, said = rollout(model, policy, state, feat[-1], key_dream, STEPS)
    on = jnp.cumprod(jnp.concatenate([begin.alive[None], said.cont]), 0)
    return Course(on[:-1] * said.reward, on[1:])


def rank(
    dreamed: Float[np.ndarray, 'P N'], real: Float[np.ndarray, 'P N'], seed: int = 0
) -> dict[str, Any]:
    """Agreement of two orders of P policies, by their mean returns from N starts.

    Returns: Spearman's `correlation` with its `low` and `high` (percentile bootstrap over starts,
        the same of all policies), and the `place` (1 is best) that the policy with the highest
        dreamed return takes in the game.
    """

    def agreement(rows: np.ndarray) -> float:
        said, true = dreamed[:, rows].mean(1), real[:, rows].mean(1)
        if not (np.ptp(said) and np.ptp(true)):
            return 0.0  # all are equal
        return float(scipy.stats.spearmanr(said, true).statistic)

    count = dreamed.shape[1]
    draws = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    low, high = np.quantile([agreement(rows) for rows in draws], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    played = real.mean(1)
    picked = played[dreamed.mean(1).argmax()]
    return {
        'correlation': agreement(np.arange(count)),
        'low': float(low),
        'high': float(high),
        'place': float(1 + (played > picked).sum()),
    }


def measure(
    env: Env,
    model: Callable[[Params], WorldModel],
    params: Params,
    makers: Sequence[Player],
    heads: Sequence[Player],
    key: PRNGKeyArray,
    *,
    context: int,
    discount: float,
) -> dict[str, Any]:
    """Let policies play and dream from the same starts, for each seed of params [seeds, ...].

    Args:
        env: on the device.
        model: weights of one seed -> its world model; traced.
        makers: players without memory, of all strengths; the starts are of their play, as many each.
        heads: further players.
        context: C, frames given before a dream.

    Returns: `starts`, `steps`, `discount`, `policies` [name, dreamed, real] with mean returns, and
        the entries of `rank`; all but the first three as `of_runs` gives them.
    """
    key_start, key_real, key_dream = jax.random.split(key, 3)
    seeds = [
        jax.tree.map(lambda x, i=i: x[i], params) for i in range(len(jax.tree.leaves(params)[0]))
    ]
    each = -(-STARTS // len(makers))
    begin = functools.partial(starts, env, count=each, context=context)
    begun = jax.jit(begin, static_argnums=0)
    moments: Starts = jax.tree.map(
        lambda *x: jnp.concatenate(x),
        *(
            begun(p.actor, p.weights(seeds[0]), jax.random.fold_in(key_start, i))
            for i, p in enumerate(makers)
        ),
    )

    @functools.partial(jax.jit, static_argnums=0)
    def play(actor: Actor, weights: Params, greedy: Array | bool, moments: Starts) -> Course:
        again = lambda x: jnp.tile(x, (EPISODES, *[1] * (x.ndim - 1)))
        begin: Starts = jax.tree.map(again, moments)
        course = real_course(env, actor, weights, begin, key_real, greedy)
        each: Course = jax.tree.map(lambda x: x.reshape(len(x), EPISODES, -1).mean(1), course)
        return each

    @functools.partial(jax.jit, static_argnums=1)
    def dream(
        params: Params, player: Any, weights: Params, greedy: Array | bool, moments: Starts
    ) -> Course:
        net = model(params)
        return dreamed_course(net, player(net, weights, greedy), moments, key_dream)

    found, drifts = [], []
    players = (*makers, *heads)
    for mine in seeds:
        real = [play(p.actor, p.weights(mine), p.greedy, moments) for p in players]
        dreamed = [dream(mine, p.policy, p.weights(mine), p.greedy, moments) for p in players]
        drifts.append(drift(dreamed[: len(makers)], real[: len(makers)]))
        totals = [np.stack([x.total(discount) for x in courses]) for courses in (dreamed, real)]
        found.append((totals[0], totals[1]))
    facts = {'starts': len(moments.alive), 'steps': STEPS, 'discount': discount}
    return facts | summary([p.name for p in players], found) | {'drift': over_runs(drifts)}


def drift(dreamed: Sequence[Course], real: Sequence[Course]) -> list[dict[str, float]]:
    """How dreams part from the game with time: for each of `SPANS`, the sum of rewards within and
    the share of episodes that go on after it, means over players and starts.
    """
    found = []
    for first, last in SPANS:
        row = {}
        for name, courses in (('dreamed', dreamed), ('real', real)):
            reward = np.mean([np.asarray(x.reward)[first - 1 : last].sum(0) for x in courses])
            row[f'{name}_reward'] = float(reward)
            row[f'{name}_on'] = float(np.mean([np.asarray(x.on)[last - 1] for x in courses]))
        found.append(row)
    return found


def over_runs(drifts: Sequence[list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Rows of all seeds as one, each number as `of_runs` gives it."""
    return [
        {name: of_runs([row[name] for row in rows]) for name in rows[0]}
        for rows in zip(*drifts, strict=True)
    ]


def summary(names: Sequence[str], found: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Merge (dreamed, real) returns [P, N] of each seed; see `measure`."""
    ranks = [rank(dreamed, real) for dreamed, real in found]
    over = {name: of_runs([one[name] for one in ranks]) for name in ranks[0]}
    policies = [
        {
            'name': name,
            'dreamed': of_runs(np.array([dreamed[i].mean() for dreamed, _ in found])),
            'real': of_runs(np.array([real[i].mean() for _, real in found])),
        }
        for i, name in enumerate(names)
    ]
    return {'policies': policies, **over}


def sentence(ranking: Mapping[str, Any]) -> str:
    """The agreement in one line."""
    correlation, policies = ranking['correlation'], len(ranking['policies'])
    seeds = len(correlation['per_seed'])
    if correlation['ci95'] is not None:
        low, high = correlation['ci95']
        over = f't over {seeds} world models'
    else:
        low, high = ranking['low']['mean'], ranking['high']['mean']
        over = f'bootstrap over {ranking["starts"]} starts of one world model'
    third = policies / 3
    places = ranking['place']['per_seed']
    best = sum(place <= third for place in places)
    where = (
        f'number {places[0]:.0f} of {policies} in the game'
        if seeds == 1
        else f'in the best third of the game with {best} of {seeds} world models'
    )
    return (
        f'dreams rank {policies} policies as the game does by {correlation["mean"]:.2f} '
        f'({low:.2f} to {high:.2f}, {over}; 1 is the same order), the best dreamed one is {where}'
    )
