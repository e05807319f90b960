"""Sharded checkpoints: logical tensors as zarr arrays in a folder or an object store."""
