"""Renders what schedulers take, as text to read before it is applied: sbatch scripts, RayJobs, compose files."""
