"""Rollout engines: continuous batching over a paged KV cache, and the protocol that engines share."""
