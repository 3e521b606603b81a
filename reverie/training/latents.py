"""Latents of a frozen tokenizer, computed once between the phase that trains it and the next."""

import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from reverie.data.episodes import Episodes
from reverie.data.latents import LatentStore, deviation
from reverie.data.source import Source
from reverie.io import warn
from reverie.types import Params, Tokenizing


class LatentCache:
    """Latents of a run's recordings, by the tokenizer of each seed.

    sources: by the name of their files, e.g. train and held_out; a source of several recordings
    has train_0, train_1, ..
    """

    def __init__(self, folder: pathlib.Path, agent: Tokenizing, sources: Mapping[str, Source]):
        self.store, self.agent, self.sources = LatentStore(folder / 'latents'), agent, sources
        self.done = False

    def end_tokenizer(self, params: Params) -> Params:
        """Return params [seeds, ...] whose latents have a deviation of 1 over all recordings, if the
        agent asks for it, and let the sources hand out latents, if it caches them.
        """
        if self.agent.scales_latents:
            recordings, reach = self.sources['train'].recordings, self.agent.reach
            seeds = _each(params)
            found = [deviation(recordings, self._encoder(p), reach) for p in seeds]
            scaled = [
                self.agent.with_latent_scale(p, jnp.float32(1 / x))
                for p, x in zip(seeds, found, strict=True)
            ]
            params = jax.tree.map(lambda *x: jnp.stack(x), *scaled)
            said = ', '.join(f'{x:.3f}' for x in found)
            warn(f'latents had a standard deviation of {said}; they are scaled to 1')
        # Encoded again, not multiplied: a run that takes this tokenizer gets the same bits.
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
        encoders = [self._encoder(p) for p in seeds]
        for of, source in self.sources.items():
            found = []
            for name, recordings in _files(of, source).items():
                latents = self.store.load(name, recordings, prints)
                if latents is None:
                    reach = self.agent.reach
                    latents = self.store.make(name, recordings, prints, encoders, reach)
                found.append(latents)
            source.use_latents(found)
        self.done = True

    def outline(self, params: PyTree, data: PyTree, seeds: int) -> PyTree:
        """Return the shapes of `data` once it holds latents; params: shapes of one seed."""
        if self.done or not self.agent.caches_latents:
            return data
        source = self.sources['train']
        schema = source.recordings[0].schema
        obs = jax.ShapeDtypeStruct((1, 1, *schema.obs_shape), schema.obs_dtype)
        first = jax.ShapeDtypeStruct((1, 1), bool)
        shape = jax.eval_shape(self.agent.tokenize, params, obs, first).shape[2:]
        return source.with_latents(data, jax.ShapeDtypeStruct((seeds, *shape), np.float16))

    def _encoder(self, params: Params) -> Any:
        return lambda obs, is_first: self.agent.tokenize(params, obs, is_first)


def _files(name: str, source: Source) -> dict[str, Episodes]:
    """Recordings of a source by the names of their latents' files."""
    recordings = source.recordings
    if len(recordings) == 1:
        return {name: recordings[0]}
    return {f'{name}_{i}': episodes for i, episodes in enumerate(recordings)}


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
