"""Environments of several turns: tools and tasks that answer what the model writes."""
