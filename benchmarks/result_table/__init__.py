"""What makes the table of docs/results.md: rows and what they train, the machine that they are of, and the page."""
