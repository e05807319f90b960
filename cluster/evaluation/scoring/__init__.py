"""Log-probabilities of given texts: `lockstep score`, and what an evaluation harness asks for."""
