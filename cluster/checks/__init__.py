"""Checks that exit with 1 when a promise is broken: parity of layouts, rollout/trainer mismatch, whole checkpoints."""
