"""Logical tensors: their names, shapes and initial values, and which slice of them a parameter holds. No megatron."""
