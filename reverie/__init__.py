"""Reverie: world-model agents in JAX."""

__version__ = '0.1.0'
