"""How hard problems are, as measured by pass rates, and which of them are trained on, and when."""
