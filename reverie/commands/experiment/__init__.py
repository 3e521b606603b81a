"""Experiments: an agent in an environment, from training to the report, and read back."""

from reverie.commands.experiment.base import SAFE, Experiment
from reverie.commands.experiment.played import Hosted, Played, played
from reverie.commands.experiment.recorded import Recorded
from reverie.commands.experiment.saved import describe, load, restore

__all__ = [
    'SAFE', 'Experiment', 'Hosted', 'Played', 'Recorded', 'describe', 'load', 'played', 'restore',
]  # fmt: skip
