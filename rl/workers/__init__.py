"""The classes that Ray actors run: trainer ranks, rollout workers, verifiers, environments; and groups of them."""
