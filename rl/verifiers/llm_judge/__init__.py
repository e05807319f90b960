"""LLM as a judge: a model behind an OpenAI-compatible endpoint scores completions by a rubric."""
