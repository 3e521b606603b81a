"""Latents of a frozen tokenizer, computed once between the phase that trains it and the next."""

import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from reverie.data.latents import LatentStore
from reverie.data.source import Source
from reverie.io import warn
from reverie.types import Params, Tokenizing


class LatentCache:
    """Latents of a run's recordings, by the tokenizer of each seed.

    sources: by the name of their files, e.g. train and held_out.
    """

    def __init__(self, folder: pathlib.Path, agent: Tokenizing, sources: Mapping[str, Source]):
        self.store, self.agent, self.sources = LatentStore(folder / 'latents'), agent, sources
        self.done = False

    def end_tokenizer(self, params: Params) -> Params:
        """Return params [seeds, ...] whose latents have a deviation of 1, if the agent asks for it,
        and let the sources hand out latents, if it caches them.
        """
        train = self.sources['train'].recordings
        assert train is not None
        seeds = _each(params)
        latents, deviations = self.store.make(
            'train', train, [self._encoder(p) for p in seeds], self.agent.reach
        )
        scales = [1 / x if self.agent.scales_latents else 1.0 for x in deviations]
        if self.agent.scales_latents:
            seeds = [
                self.agent.with_latent_scale(p, jnp.float32(scale))
                for p, scale in zip(seeds, scales, strict=True)
            ]
            params = jax.tree.map(lambda *x: jnp.stack(x), *seeds)
            said = ', '.join(f'{x:.3f}' for x in deviations)
            warn(f'latents had a standard deviation of {said}; they are scaled to 1')
        if self.agent.caches_latents:
            prints = [fingerprint(p) for p in seeds]
            self.store.seal('train', train, prints, latents, scales)
            self.use(params)
        return params

    def use(self, params: Params) -> None:
        """Let the sources hand out latents by the tokenizers in params [seeds, ...], computed now
        unless they are there.
        """
        if self.done or not self.agent.caches_latents:
            return
        seeds = _each(params)
        prints = [fingerprint(p) for p in seeds]
        for name, source in self.sources.items():
            recordings = source.recordings
            assert recordings is not None
            latents = self.store.load(name, recordings, prints)
            if latents is None:
                encoders = [self._encoder(p) for p in seeds]
                latents, _ = self.store.make(name, recordings, encoders, self.agent.reach)
                self.store.seal(name, recordings, prints, latents, [1.0] * len(seeds))
            source.use_latents(latents)
        self.done = True

    def outline(self, params: PyTree, data: PyTree, seeds: int) -> PyTree:
        """Return the shapes of `data` once it holds latents; params: shapes of one seed."""
        if self.done or not self.agent.caches_latents:
            return data
        episodes = self.sources['train'].recordings
        assert episodes is not None
        schema = episodes.schema
        obs = jax.ShapeDtypeStruct((1, 1, *schema.obs_shape), schema.obs_dtype)
        first = jax.ShapeDtypeStruct((1, 1), bool)
        shape = jax.eval_shape(self.agent.tokenize, params, obs, first).shape[2:]
        frames = len(data['stream'].flags)
        latents = jax.ShapeDtypeStruct((seeds, frames, *shape), np.float16)
        return self.sources['train'].with_latents(data, latents)

    def _encoder(self, params: Params) -> Any:
        return lambda obs, is_first: self.agent.tokenize(params, obs, is_first)


def fingerprint(params: Params) -> str:
    """Hash of one seed's encoder."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params['encoder']):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _each(params: Params) -> Sequence[Params]:
    """Params of each seed."""
    count = len(jax.tree.leaves(params)[0])
    return [jax.tree.map(lambda x, i=i: x[i], params) for i in range(count)]
