"""Dreamer V1 (arXiv 1912.01603), V2 (2010.02193), V3 (2301.04104) and TransDreamerV3: one agent
whose versions differ by objects of the configuration.
"""

from reverie.agents.dreamer.agent import Dreamer
from reverie.agents.dreamer.config import DreamerConfig, ReplayConfig, WorldModelConfig

__all__ = ['Dreamer', 'DreamerConfig', 'ReplayConfig', 'WorldModelConfig']
