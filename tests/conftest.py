"""What every test shares: hypothesis profiles and fake multi-device machines."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import settings

settings.register_profile("lclm", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("lclm")


@pytest.fixture
def on_devices() -> Callable[..., str]:
    """Run Python source in a new process that sees `count` CPU devices; its output."""

    def run(source: str, *, count: int = 8, timeout: float = 300) -> str:
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
            f"--xla_force_host_platform_device_count={count}",
        }
        command = [sys.executable, "-W", "error", "-c", source]
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run
