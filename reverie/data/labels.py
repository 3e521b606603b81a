"""Labels of a dataset: the episodes, or stretches of them, whose actions are used."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from reverie.data.episodes import Episodes
from reverie.data.records import Record, hide_actions
from reverie.types import UserError


@dataclasses.dataclass(frozen=True)
class Labels:
    """Choice of the actions that are used; everything else counts as unlabelled video."""

    fraction: float = 1.0
    """Share of the episodes, or of the stretches of each, that keep their actions."""

    stretch: int = 0
    """Frames of a stretch, which keeps its actions as a whole, for recordings of few and long
    episodes; 0 for whole episodes."""

    files: tuple[str, ...] = ()
    """Imported files whose episodes alone keep their actions; none for all."""

    seed: int = 0
    """Seed of the choice of whole episodes."""

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise UserError(f'label_fraction is {self.fraction}, expected 0 to 1')
        if self.stretch < 0:
            raise UserError(f'label_stretch is {self.stretch}, expected 0 or more frames')
        if self.files and self.fraction < 1 and not self.stretch:
            raise UserError(
                f'label_fraction is {self.fraction} and labelled_files are given, expected one of '
                'both, or stretches beside'
            )

    def chosen(self, episodes: Episodes) -> Bool[np.ndarray, ' E']:
        """Return the mask of the episodes that keep actions, of all of a dataset.

        Raises UserError for a file that it was not made of, or if nothing is trained on the files.
        """
        count = len(episodes)
        if self.files:
            names = episodes.provenance.get('files')
            if not isinstance(names, list) or len(names) != count:
                raise UserError(
                    f'--labelled-files {self.files[0]}: {episodes.path} does not say which file an '
                    'episode is of, expected a dataset of `reverie data import`'
                )
            kept = numbers_of(names, self.files, '--labelled-files', 'expected some of')
            if episodes.held_out.issuperset(kept):
                raise UserError(
                    f'--labelled-files {" ".join(self.files)}: held out, expected some to train on'
                )
            return np.isin(np.arange(count), list(kept))
        if self.stretch:
            return np.ones(count, bool)
        order = np.random.default_rng([self.seed, 0x1ABE1]).permutation(count)
        mask: np.ndarray = order < round(self.fraction * count)
        return mask

    def of(self, record: Record, episodes: Episodes, chosen: bool) -> Record:
        """Return an episode with the actions it keeps; `chosen` is its entry of the mask."""
        if not record.has_action:
            return record
        if not chosen:
            return hide_actions(record, episodes.schema)
        if not self.stretch or self.fraction == 1:
            return record
        return hide_actions(record, episodes.schema, self.stretches(len(record)))

    def frames(self, episodes: Episodes) -> int:
        """Return the number of frames whose actions are used; reads every record."""
        chosen, count = self.chosen(episodes), 0
        for number, record in episodes.numbered():
            kept = self.of(record, episodes, bool(chosen[number]))
            count += len(kept) * kept.has_action if kept.labelled is None else kept.labelled.sum()
        return int(count)

    def stretches(self, frames: int) -> Bool[np.ndarray, ' T']:
        """Return the mask of the frames of an episode that keep their actions.

        Stretches are spread evenly over it: the mirrored copy of a recording keeps the same ones.
        """
        number = np.arange(frames) // self.stretch
        passed = np.floor((number + np.array([[0], [1]])) * self.fraction + 0.5)
        mask: np.ndarray = passed[1] > passed[0]
        return mask


ALL = Labels()


def numbers_of(names: Sequence[str], wanted: Sequence[str], option: str, expected: str) -> set[int]:
    """Return the places of the wanted files among `names`; suffixes may be left out.

    Raises UserError, in words of the option, for a file that is not there.
    """
    stems = [name if '.' not in name else pathlib.Path(name).stem for name in names]
    for name in wanted:
        if name not in stems and name not in names:
            known = ', '.join(dict.fromkeys(stems))
            raise UserError(f'{option} {name}: no such file, {expected} {known:.200}')
    pairs = enumerate(zip(stems, names, strict=True))
    return {i for i, pair in pairs if not set(pair).isdisjoint(wanted)}
