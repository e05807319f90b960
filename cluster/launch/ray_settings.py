"""The settings that Ray reads from the environment when it is imported, as runs need them."""

import os

RAY_SETTINGS = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
    "RAY_prestart_worker_first_driver": "0",
}
"""Workers' lines come through as they were written, each saying who speaks; who reserves no GPU still sees them. No
process starts for each core of the machine: workers have variables of their own, so that Ray starts others for them."""


def set_ray_defaults() -> None:
    """Put the settings into the environment, where it does not have others."""
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
