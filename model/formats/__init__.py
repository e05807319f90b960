"""Checkpoints of other libraries: each format has a reader that gives logical tensors and a writer that takes them."""
