"""Checkpoint conversion: planned in small parts, written by several processes, resumable."""
