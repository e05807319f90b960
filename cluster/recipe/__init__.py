"""Recipes: TOML files that configure a run, their schema and their errors."""
