"""Evaluates a model: completions of held-out problems, verdicts, pass@k, intervals; log-likelihoods of given texts."""
