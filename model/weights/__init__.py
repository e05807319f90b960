"""Logical tensors: their names, shapes and initial values, and the slice map. Loads no megatron-core."""
