"""Runs untrusted programs against tests, isolated by namespaces, seccomp, Landlock and resource limits."""
