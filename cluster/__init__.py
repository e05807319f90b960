"""The command line, recipes, jobs, placement, conversion, evaluation, serving and reports."""
