"""Collectives of a compiled program: how many, and how many bytes a device moves."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
WIDTHS |= {"f64": 8, "s64": 8, "u64": 8}
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_KIND = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLS = re.compile(r"\b(?:calls|body|branch_computations)=(\{[^}]*\}|%[\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_BOUND = re.compile(r"%([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_LESS = re.compile(r"ROOT .* compare\(%[\w.\-]+, %([\w.\-]+)\), direction=LT")
_GROUPS = re.compile(r"replica_groups=(?:\[(\d+),(\d+)\]|\{\{([\d,]*)\})")
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_CHAIN = re.compile(r'channel_id=(\d+).*chain_id="?(\d+)')


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """Kind -> (times run, bytes a device sends) in one run of a program's HLO text.

    A loop whose trip count the compiler knows, or that counts up to a constant, counts
    that often, another once. What a TPU splits into start, fused and done parts is one.
    Bytes are those a ring would move: (n - 1) / n of the larger side of n devices,
    twice that for an all-reduce.
    """
    bodies = dict(_computations(hlo))
    entry = next(
        (n for n, lines in bodies.items() if lines and lines[0].startswith("ENTRY")), ""
    )
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    _walk(bodies, entry, 1, found, set())
    return {kind: (times, size) for kind, (times, size) in sorted(found.items())}


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = "", []
    for line in hlo.splitlines():
        head = _HEAD.match(line)
        if head:
            name, lines = head[1], [line]
        elif line.startswith("}"):
            yield name, lines
        else:
            lines.append(line)


def _walk(bodies: dict, name: str, times: int, found: dict, parts: set) -> None:
    """Add what a computation runs; `parts` are the split collectives seen in it."""
    for line in bodies.get(name, ())[1:]:
        kind, chain = _KIND.search(line), _CHAIN.search(line)
        part = (kind[2], *chain.groups()) if kind and chain else None
        if kind and part not in parts:
            found[kind[2]][0] += times
            found[kind[2]][1] += times * _moved(kind[2], kind[1], line)
        if part:
            parts.add(part)
        loop = " while(" in line
        for call in _CALLS.finditer(line):
            inner = times * (_trips(bodies, line) if loop else 1)
            for target in re.findall(r"%([\w.\-]+)", call[1]):
                _walk(bodies, target, inner, found, set() if loop else parts)


def _trips(bodies: dict, line: str) -> int:
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", line)
    lines = bodies.get(condition[1], ()) if condition else ()
    bounds = dict(m.groups() for m in map(_BOUND.search, lines) if m)
    less = [m[1] for m in map(_LESS.search, lines) if m]
    return int(bounds.get(less[0], 1)) if less else 1


def _moved(kind: str, result: str, line: str) -> int:
    sizes = [
        WIDTHS.get(dtype, 4) * math.prod(int(d) for d in dims.split(",") if d)
        for dtype, dims in _SHAPE.findall(result)
    ]
    groups, size = _GROUPS.search(line), max(sizes, default=0)
    count, axes = 2, _AXES.search(line)
    if axes:
        shape = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        count = math.prod(int(shape[a]) for a in re.findall(r"'(\w+)'", axes[2]))
    elif groups:
        count = int(groups[2]) if groups[2] else len(groups[3].split(","))
    if kind == "reduce-scatter":
        size *= count
    if kind == "collective-permute":
        return size
    share = (count - 1) / max(count, 1)
    return int(size * share * (2 if kind == "all-reduce" else 1))
