"""Reinforcement learning from rewards and verifiers: rollouts, scoring, advantages, updates, as Ray actors."""
