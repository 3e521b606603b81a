"""Whole losses of the recurrent agents are those of plain scans, and so are their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reverie.agents import planet, registry
from reverie.commands.bench.phases import RandomBatches
from reverie.models import rssm
from reverie.objectives import behavior, latent
from reverie.types import ActionSpace, EnvSpec
from tests.small import shrink

PRESETS = {
    'dreamer_v3_small': ActionSpace('discrete', 3),
    'dreamer_v1_small': ActionSpace('continuous', 2),
    'planet_small': ActionSpace('continuous', 2),
}


@pytest.mark.parametrize(
    'preset',
    ['dreamer_v3_small', *(pytest.param(p, marks=pytest.mark.whole) for p in list(PRESETS)[1:])],
)
def test_losses_and_gradients_are_those_of_plain_scans(preset, monkeypatch):
    spec = EnvSpec('noise', (6,), PRESETS[preset])
    agent = registry.make(shrink(registry.get(preset)), spec)
    (phase,) = agent.phases
    params = jax.jit(agent.init)(jax.random.key(0))
    batch = RandomBatches(spec).draw({}, None, jax.random.key(1), 4, 7)
    starts = batch.step.is_first.at[0, 3].set(True)  # an episode begins within a window
    reward = jax.random.normal(jax.random.key(2), batch.step.reward.shape)
    batch = batch._replace(step=batch.step._replace(is_first=starts, reward=reward))

    def found():
        def total(params):
            losses = phase.loss(params, batch, jax.random.key(3), jnp.int32(0))[0]
            means = {name: x.mean() for name, x in losses.items()}
            return sum(means.values()), means

        return jax.jit(jax.grad(total, has_aux=True))(params)

    lean_grads, lean = found()
    for module in (rssm, behavior, latent, planet):
        monkeypatch.setattr(module, 'lean_scan', jax.lax.scan)
    grads, plain = found()
    for name, x in plain.items():
        np.testing.assert_allclose(lean[name], x, rtol=1e-6, atol=1e-6, err_msg=name)
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    for (path, a), b in zip(leaves, jax.tree.leaves(lean_grads), strict=True):
        scale = max(float(jnp.abs(a).max()), 1e-3)
        np.testing.assert_allclose(b / scale, a / scale, atol=1e-5, err_msg=str(path))
    assert len(leaves) > 20 and max(float(jnp.abs(a).max()) for _, a in leaves) > 1e-2
