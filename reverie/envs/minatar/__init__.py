"""Five games of MinAtar in pure JAX.

Rules: Young and Tian, 'MinAtar: An Atari-Inspired Testbed for Thorough and Reproducible
Reinforcement Learning Experiments' (2019). Each game is one module with a frozen dataclass of four
pure methods; `env.MinAtar` makes it an environment.
"""
