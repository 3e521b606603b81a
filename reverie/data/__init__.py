"""Datasets: the native format on disk, windows of it, and the sources that training reads from."""

from reverie.data.episodes import Episodes, Splitter, Writer, split_stream, verify
from reverie.data.mixture import Mixture
from reverie.data.opening import open_mixture, open_source
from reverie.data.sources import Resident, Streaming
from reverie.data.summary import inspect, render

__all__ = [
    'Episodes',
    'Mixture',
    'Resident',
    'Splitter',
    'Streaming',
    'Writer',
    'inspect',
    'open_mixture',
    'open_source',
    'render',
    'split_stream',
    'verify',
]
