"""The code jail: runs untrusted programs against tests in namespaces, seccomp, Landlock and resource limits."""
