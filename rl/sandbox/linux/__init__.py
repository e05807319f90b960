"""Linux mechanisms that isolate a process: namespaces, Landlock, seccomp, rlimits."""
