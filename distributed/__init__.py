"""Runs any nn.Module in any parallel layout: process groups, schedules, ZeRO, checkpoints. Knows no language model."""
