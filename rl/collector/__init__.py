"""Keeps judged groups of completions coming while the learner works."""
