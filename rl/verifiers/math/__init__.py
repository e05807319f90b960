"""Grades the final answer of a mathematical response against a reference answer."""
