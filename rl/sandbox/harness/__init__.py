"""The trusted side of a sandbox: runs tests on a program that runs in another process, and gives the verdict."""
