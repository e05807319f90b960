"""`python -m lockstep` is the `lockstep` command."""

from lockstep.cluster.cli import main

main()
