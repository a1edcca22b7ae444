"""Refusing a request before it is allocated."""

import jax

from lclm.errors import LclmError


def available_bytes() -> int | None:
    """Bytes the default device can still allocate; None where it does not say."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else limit - stats.get("bytes_in_use", 0)
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def require(needed: int, what: str, remedy: str) -> None:
    """Raise unless `needed` bytes are there."""
    free = available_bytes()
    if free is not None and needed > free:
        raise LclmError(
            f"{what} needs {format_bytes(needed)}, but only {format_bytes(free)} are "
            f"available; {remedy}"
        )


def format_bytes(count: int) -> str:
    """1536 -> '1.5 KiB'."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
