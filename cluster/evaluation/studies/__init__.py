"""Studies of language models: a measurement for each checkpoint, place and seed, kept as JSON lines, with intervals."""
