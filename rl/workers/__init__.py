"""What each kind of Ray actor does: train a model, generate rollouts, verify answers, play environments."""
