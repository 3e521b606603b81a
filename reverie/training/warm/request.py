"""The request of a warm start, as the command line gives it."""

import dataclasses
import pathlib
from collections.abc import Iterable

from reverie.types import UserError


@dataclasses.dataclass(frozen=True)
class Init:
    """Phases or groups to take from another run; each phase that is not taken is trained."""

    run: pathlib.Path
    """Folder of the other run."""

    phases: tuple[str, ...] = ()
    """Finished phases to take: the first of these with all before it, and each of the others; none
    stands for every phase that the run has finished, from the first on.
    """

    extend: bool = False
    """Train the first of `phases` on, from the optimiser's state at its end to its updates here."""

    groups: tuple[str, ...] = ()
    """Take only the weights of these parameter groups, as they were at the end of the first of
    `phases` (in the newest checkpoint, if none is given), and train every phase.
    """

    def __post_init__(self) -> None:
        if not all(self.phases):
            raise UserError(
                f'--from {self}: expected RUN, RUN:PHASE, RUN:PHASE+ or RUN:PHASE,PHASE'
            )
        if self.groups and (self.extend or len(self.phases) > 1):
            raise UserError(
                f'--from {self}: groups are taken from the end of one phase, expected RUN or RUN:PHASE'
            )

    @classmethod
    def parse(cls, text: str, groups: Iterable[str] = ()) -> 'Init':
        """Read 'RUN', 'RUN:finetune', 'RUN:imagine+' or 'RUN:finetune,imagine'.

        Raises UserError for anything else.
        """
        run, colon, what = text.rpartition(':')
        if not colon or pathlib.Path(text).exists():
            return cls(pathlib.Path(text), groups=tuple(groups))
        first, *others = what.split(',')
        phases = (first.removesuffix('+'), *others)
        return cls(pathlib.Path(run), phases, first.endswith('+'), tuple(groups))

    @property
    def what(self) -> str:
        """The request as it follows the run on the command line."""
        text = ''
        if self.phases:
            first, *others = self.phases
            text = ':' + ','.join((first + '+' * self.extend, *others))
        if self.groups:
            text += f' --from-groups {" ".join(self.groups)}'
        return text

    def __str__(self) -> str:
        return f'{self.run}{self.what}'
