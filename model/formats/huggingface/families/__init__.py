"""Model families of `transformers`: config.json to and from ModelConfig."""
