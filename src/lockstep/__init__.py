"""Lockstep: language models trained with the same numbers in any layout."""

__version__ = "0.1.0"
