"""Batch-invariant operations: a row's result has the same bits whatever else is in the batch."""
