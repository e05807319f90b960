"""Judges completions: mathematical answers, programs, reasoning-gym entries, each in processes that can be killed."""
