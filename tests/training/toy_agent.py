"""A toy with two phases and an in-memory source, small enough to check against NumPy by hand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from reverie.data.source import Dataset
from reverie.types import ActionSpace, Batch, EnvSpec, Phase, Step

SPEC = EnvSpec('toy', (3,), ActionSpace('discrete', 2))
BATCH, LENGTH = 4, 2


def table(rows: int = 64) -> dict[str, jax.Array]:
    """Inputs and targets of a linear map."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, LENGTH, 3)).astype(np.float32)
    return dict(obs=jnp.asarray(x), reward=jnp.asarray(x @ np.array([1.0, -2.0, 0.5], np.float32)))


@dataclasses.dataclass
class Table(Dataset):
    """Rows drawn at random on the device; counts what it has handed out, as a stateful source
    would.
    """

    data: Any = dataclasses.field(default_factory=table)
    drawn: int = 0

    def load(self, updates, batch, length, seeds, relevant=0.0):
        self.drawn += updates
        return None

    def draw(self, data, loaded, key, batch, length, relevant=0.0):
        rows = jax.random.bits(key, (batch,)) % data['obs'].shape[0]
        obs, reward = data['obs'][rows], data['reward'][rows]
        no, yes = jnp.zeros((batch, length), bool), jnp.ones((batch,), bool)
        return Batch(Step(obs, jnp.zeros((batch, length, 2)), reward, no, no, no), yes, yes, yes)

    def get_state(self):
        return dict(drawn=self.drawn)

    def set_state(self, state):
        self.drawn = state['drawn']


class Stream(Table):
    """The same rows, chosen on the host in an order that only its state knows."""

    def load(self, updates, batch, length, seeds, relevant=0.0):
        rows = np.arange(self.drawn, self.drawn + updates * seeds * batch) % 64
        self.drawn += updates * seeds * batch
        return jnp.asarray(rows.reshape(updates, seeds, batch))

    def draw(self, data, loaded, key, batch, length, relevant=0.0):
        data = jax.tree.map(lambda x: x[loaded], data)
        return Table.draw(self, data, None, key, batch, length)


def model_loss(params, batch, key, step):
    """Two terms of very different size; noise, so that a wrong key shows."""
    obs = batch.step.obs + 0.01 * jax.random.normal(key, batch.step.obs.shape)
    pred = jnp.tanh(obs @ params['model']['w']) @ params['model']['v']
    return dict(fit=(pred - batch.step.reward) ** 2, size=1e3 * jnp.abs(pred)), dict(
        pred=pred.mean()
    )


def head_loss(params, batch, key, step):
    pred = batch.step.obs @ params['head']['w'] + params['model']['v'].sum()
    return dict(head=(pred - batch.step.reward) ** 2), {}


class Crash(RuntimeError):
    pass


class Fails:
    """Part of a source that fails when asked for batches for the `calls`-th time."""

    calls = 0

    def load(self, *args):
        self.calls -= 1
        if self.calls == 0:
            raise Crash
        return super().load(*args)


class FailingTable(Fails, Table):
    pass


class FailingStream(Fails, Stream):
    pass


@dataclasses.dataclass(frozen=True)
class Toy:
    phases: tuple[Phase, ...]
    spec: EnvSpec = SPEC
    readouts: Any = dataclasses.field(default_factory=dict)

    def init(self, key):
        x = jax.random.normal(
            key, (35,)
        )  # one draw: random numbers are what takes long to compile here
        return dict(model=dict(w=x[:24].reshape(3, 8) / 2, v=x[24:32] / 3), head=dict(w=x[32:]))


def toy(steps=(20, 10), model=model_loss, **changes) -> Toy:
    """Phase `model`: RMS-normalised losses, a weight mean.

    Then phase `head`, which begins from half the head.
    """
    first = Phase(
        'model',
        ('model',),
        model,
        dict(fit=1.0, size=0.1),
        optax.adam(1e-2),
        steps[0],
        BATCH,
        LENGTH,
        rms_decay=0.9,
        ema_decay=0.8,
    )
    halve = lambda p: {**p, 'head': jax.tree.map(lambda x: x / 2, p['head'])}
    second = Phase(
        'head',
        ('head',),
        head_loss,
        dict(head=1.0),
        optax.sgd(0.05),
        steps[1],
        BATCH,
        LENGTH,
        begin=halve,
    )
    return Toy((dataclasses.replace(first, **changes), second))


def poisoned(first: int, last: int):
    """`model_loss`, with NaN in `size` from update `first` to `last` (counted from 0)."""

    def loss(params, batch, key, step):
        losses, metrics = model_loss(params, batch, key, step)
        bad = (step >= first) & (step <= last)
        return {**losses, 'size': jnp.where(bad, jnp.nan, losses['size'])}, metrics

    return loss


def main(folder: str, checkpoint_every_s: float = 0.0):
    """A run for tests that kill it: checkpoints after every call."""
    from reverie.training.run import run

    return run(
        toy((1000, 500)),
        Table(),
        folder,
        seeds=2,
        checkpoint_every_s=checkpoint_every_s,
        log_every_s=0.0,
        updates_per_call=50,
        config=dict(lr=1e-2),
    )


if __name__ == '__main__':
    import sys

    main(sys.argv[1])
