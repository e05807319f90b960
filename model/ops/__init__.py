"""Tensor operations without parameters, one signature for each, whatever device or numerics computes it."""
