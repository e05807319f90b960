"""Structured output of the server: JSON of a schema, and tool calls, as request bodies ask for them."""
