"""Evaluates a model on held-out problems: completions, verdicts, pass@k and confidence intervals."""
