"""The engines that `rollout_peers.py` compares, a module for each, which runs in an environment of its own."""
