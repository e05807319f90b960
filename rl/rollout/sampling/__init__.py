"""Draws tokens from logits, for one sequence and for a batch in parallel, and scores prompts."""
