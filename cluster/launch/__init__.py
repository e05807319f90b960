"""Launches a run: plans and checks it, reserves devices, starts actors, and finds where it resumes."""
