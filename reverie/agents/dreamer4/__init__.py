"""Dreamer 4 (arXiv 2509.24527): tokenizer, shortcut dynamics, agent finetuning, imagination."""

from reverie.agents.dreamer4.agent import Dreamer4
from reverie.agents.dreamer4.config import Dreamer4Config, PhaseConfig

__all__ = ['Dreamer4', 'Dreamer4Config', 'PhaseConfig']
