"""Copies a new version of the policy's weights into the rollout engines, and proves that it arrived."""
