"""Runs a recipe: its phases in order, pretraining, profiling, submission as a Ray job."""
