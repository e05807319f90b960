"""The transformer, its attention, losses and training, and its tensors in every checkpoint format."""
