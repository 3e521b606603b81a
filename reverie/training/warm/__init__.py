"""Warm starts: weights of finished phases, or of parameter groups by name, from another run.

The other run is only read, and only until this one has saved its first checkpoint; config.json
keeps what was taken, from which checkpoints, and the other run's own entry, so that the chain back
to the first run is in every run.
"""

from reverie.training.warm.record import ancestors, outline, remembered, summary
from reverie.training.warm.request import Init
from reverie.training.warm.start import Start, plan

__all__ = ['Init', 'Start', 'ancestors', 'outline', 'plan', 'remembered', 'summary']
