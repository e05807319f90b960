"""Exit codes of the commands that run recipes: what ended a run, for schedulers and scripts.

| code | what ended the command |
|---|---|
| 0 | success |
| 1 | the run failed, and would again: an error of the recipe's own code, a loss that diverged, a full disk |
| 2 | the user's error: a recipe, an option or an address that is refused, before the first step |
| 75 | the infrastructure: a process or a node that died, a cluster that does not answer; trying again may help |
| 124 | out of time: the run has saved, and goes on with `--resume` |
| 130 | Ctrl-C, SIGTERM or `lockstep stop`: the run has saved, and goes on with `--resume` |
"""

SUCCESS, FAILED, REFUSED, INFRASTRUCTURE, OUT_OF_TIME, INTERRUPTED = 0, 1, 2, 75, 124, 130


class Unreachable(ValueError):
    """A cluster that does not answer; commands that end with it have the exit code of infrastructure."""
