"""Attention over packed documents and over paged KV caches, fast and batch-invariant."""
