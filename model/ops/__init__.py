"""Tensor operations without parameters: one signature for each, on any device, in fast and exact numerics."""
