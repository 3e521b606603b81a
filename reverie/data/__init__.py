"""Datasets: the native format on disk, windows of it, and the sources that training reads from."""

from reverie.data.episodes import Episodes, Splitter, Writer, split_stream, verify
from reverie.data.sources import Resident, Streaming, open_source
from reverie.data.summary import inspect, render

__all__ = [
    'Episodes',
    'Resident',
    'Splitter',
    'Streaming',
    'Writer',
    'inspect',
    'open_source',
    'render',
    'split_stream',
    'verify',
]
