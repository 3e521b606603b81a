"""Commands of `reverie`, one file each: their options as a dataclass, and `run`.

These files import nothing heavy at the top, so that --help and a mistyped option answer at once.
"""
