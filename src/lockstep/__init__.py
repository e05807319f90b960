"""Lockstep: language models trained with the same numbers in any layout."""
