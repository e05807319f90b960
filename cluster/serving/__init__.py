"""An OpenAI-compatible HTTP server over the rollout engine."""
