"""vLLM as a rollout engine: an adapter to the protocol `Engine`, which loads no library of training."""
