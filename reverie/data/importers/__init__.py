"""Import of foreign recordings as datasets, a module for each kind."""

import pathlib
from collections.abc import Callable

from reverie.data.importers.common import Importer, Options, Say, write
from reverie.data.importers.decoding import Limits
from reverie.data.importers.minari import Hdf5
from reverie.data.importers.npz import Archives
from reverie.data.importers.video import Videos
from reverie.data.importers.vpt import Contractors

__all__ = ['KINDS', 'Importer', 'Limits', 'Options', 'write']

# (source, name of the environment, options, say) -> importer
KINDS: dict[str, Callable[[pathlib.Path, str, Options, Say], Importer]] = {
    'video': Videos,
    'npz': Archives,
    'minari': Hdf5,
    'vpt': Contractors,
}
