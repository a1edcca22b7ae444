"""One measurement per line: JSON in on stdin, JSON out on stdout.

Standard library only: peers run in another Python than lclm. A peer is persistent, so
measurements of different peers alternate (A B A B) without loading models again.
"""

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

Peer = Callable[[dict[str, Any]], dict[str, Any]]


def prompts(vocab: int, length: int, batch: int) -> list[list[int]]:
    """Rows of ordinary token ids, the same for every peer and on every machine."""
    low = 256
    return [
        [low + (7919 * i + 104729 * row) % (vocab - low) for i in range(length)]
        for row in range(batch)
    ]


def serve(make: Callable[[dict[str, Any]], Peer]) -> None:
    """Answer requests until stdin ends. The first line holds the settings of `make`.

    Whatever the library prints goes to stderr; stdout carries answers only.
    """
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    measure: Peer | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if measure is None:
                began = time.perf_counter()
                measure = make(request)
                answer: dict[str, Any] = {"loaded": time.perf_counter() - began}
            else:
                reset_peak()
                answer = measure(request)
                answer["peak_rss"] = peak_rss()
                give_back()
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")
        if measure is None:
            return


def give_back() -> None:
    """Free pages to the system (glibc only): the next peer may need them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def reset_peak() -> None:
    """Forget the highest resident size so far (Linux only; elsewhere it stays)."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return


def peak_rss() -> int:
    """Highest resident bytes since `reset_peak`."""
    try:
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
