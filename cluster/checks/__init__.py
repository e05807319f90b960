"""Checks that exit with 1 when a promise is broken: layouts, rollouts against trainer, checkpoints."""
