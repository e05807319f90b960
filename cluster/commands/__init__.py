"""The subcommands of `lockstep`; the only place that knows command-line flags."""
