"""Grades mathematics: finds the final answer of a response and compares it with the reference answer."""
