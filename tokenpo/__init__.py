"""tokenpo: preference optimization and RL at the level of single tokens."""

__version__ = "0.1.0"
