"""The studies, one a module: `lockstep study NAME` finds a module's `STUDY` by the module's name."""
