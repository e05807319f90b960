"""Loss functions: pure functions from per-token log-probabilities and batch columns to a loss and its metrics."""
