"""Rewards, advantages, training samples and preference pairs of every method, as pure functions of rollouts."""
