"""`make kernels`: the kernels' values, and what compilers make of them.

Values are checked on the CPU against the dense oracle, with the TPU simulator's race
detector for a few. Then each kernel is compiled, at the size of real use, for chips
that are not here, and what comes out (spills, bundles, vector and scalar memory) is
held against `budgets.json`. A case is compiled in a process of its own, whose compiler
writes its schedules to a folder that is thrown away.

    python -m tests.kernels.prove [--chips=v5e,v6e] [--cases=window] [--update]
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUDGETS = HERE / "budgets.json"
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# What fails where it grows; a spill fails at once.
MEASURES = ("bundles", "vmem", "smem")
SLACK = 1.02


def cases() -> dict:
    """Name -> (mask, tokens, query heads, kv heads, width, options)."""
    from pallas_kernels import mask as M

    sinks = M.causal() & (M.window(4096) | M.sink(4))
    stripes = M.causal() & M.block_sparse(128, 4, 8, kv_heads=2)
    packed = dict(segments=True, sink=True, softcap=30.0)
    return {
        "causal": (M.causal(), 32_768, 8, 2, 128, {}),
        "window": (sinks, 1_048_576, 8, 2, 128, {}),
        "stripes": (stripes, 32_768, 8, 2, 128, {}),
        "packed": (M.causal() & M.window(4096), 32_768, 8, 8, 64, packed),
        "float32": (M.causal(), 8192, 4, 2, 64, dict(dtype="float32")),
    }


def compile_case(chip: str, name: str) -> None:
    """Compile one case's forward and backward pass for a chip (in a child process)."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels import dispatch
    from pallas_kernels.attention import attention

    mask, T, N, K, H, options = cases()[name]
    dtype = jnp.dtype(options.get("dtype", "bfloat16"))
    found = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
    place = SingleDeviceSharding(found.devices[0])

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    q, kv = array((1, T, N, H), dtype), array((1, T, K, H), dtype)
    ids = array((1, T), jnp.int32) if options.get("segments") else None
    sink = array((N,), jnp.float32) if options.get("sink") else None

    def run(q, k, v, sink, ids, d_out, d_lse):
        def attend(q, k, v, sink):
            return attention(
                q, k, v, mask=mask, softcap=options.get("softcap"), sink=sink,
                q_segment_ids=ids, kv_segment_ids=ids, implementation="mosaic_tpu",
            )  # fmt: skip

        outs, back = jax.vjp(attend, q, k, v, sink)
        return outs, back((d_out, d_lse))

    d_lse = array((1, N, T), jnp.float32)
    with dispatch.target("tpu"):
        lowered = jax.jit(run).lower(q, kv, kv, sink, ids, q, d_lse)
    memory = lowered.compile().memory_analysis()
    print(json.dumps({"temporary": memory.temp_size_in_bytes}))


def measure(folder: Path) -> dict[str, dict[str, int]]:
    """What a dump says of each kernel: the largest where there are several of one."""
    found: dict[str, dict[str, int]] = {}
    for path in folder.glob("*-final_hlo-static-per-bundle-utilization.txt"):
        kernel = re.search(r"-(attention_\w+)\.", path.name)
        if kernel is None:
            continue
        lines = path.read_text().splitlines()
        names = (
            next(x for x in lines if x.startswith("MXU")).replace(" ", "").split(",")
        )
        rows = [x.split() for x in lines if re.match(r"\d+ \d+ ", x)]
        spills = names.index("VSTORE:SPILL")
        stem = re.sub(r"-\d+-final_hlo.*", "", path.name)
        (final,) = folder.glob(f"{stem}-*-pre-finalize-registers-and-allocations.txt")
        sizes = re.findall(r"space=(\w+), size = (0x[0-9a-f]+)", final.read_text())
        own = found.setdefault(kernel[1].removesuffix("_"), {})
        for key, value in {
            "bundles": len(rows),
            "spills": sum(int(row[spills]) for row in rows),
            "vmem": sum(int(n, 16) for space, n in sizes if space == "vmem"),
            "smem": sum(int(n, 16) for space, n in sizes if space == "smem"),
        }.items():
            own[key] = max(value, own.get(key, 0))
    return found


def compiled(chip: str, name: str) -> dict[str, dict[str, int]]:
    """Compile a case in a process of its own and measure its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} "
            "--xla_jf_dump_llo_text=true",
        }
        command = [sys.executable, "-m", "tests.kernels.prove", "--compile", chip, name]
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{chip} {name} does not compile:\n{done.stderr[-4000:]}")
        found = measure(Path(folder))
    if not found:
        raise SystemExit(f"{chip} {name}: the compiler wrote no schedule of a kernel")
    return found


def breaches(found: dict, budgets: dict) -> list[str]:
    """What of a chip's case is over its budget, or has none."""
    wrong = []
    for kernel, own in found.items():
        if own["spills"]:
            wrong.append(f"{kernel}: {own['spills']} spills")
        for key in MEASURES:
            most = budgets.get(kernel, {}).get(key)
            if most is None:
                wrong.append(f"{kernel}: no budget of {key}")
            elif own[key] > most * SLACK:
                wrong.append(f"{kernel}: {own[key]:,} {key}, budget {most:,}")
    return wrong


def table(everything: dict) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| chip | case | kernel | bundles | spills | VMEM, KiB | SMEM, KiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for chip, rows in everything.items():
        for name, kernels in rows.items():
            for kernel, own in sorted(kernels.items()):
                sizes = [f"{-(-own[key] // 1024):,}" for key in ("vmem", "smem")]
                cells = [f"{own['bundles']:,}", str(own["spills"]), *sizes]
                lines.append(f"| {' | '.join([chip, name, kernel, *cells])} |")
    return "\n".join(lines)


def values() -> None:
    """The laws of the values, in interpret mode."""
    from tests.kernels import simulated

    for name, check in simulated.CHECKS.items():
        began = time.perf_counter()
        check()
        print(f"values: {name} ({time.perf_counter() - began:.0f} s)", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run it; 1 where something is over its budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", default=",".join(CHIPS))
    parser.add_argument("--cases", default=",".join(cases()))
    parser.add_argument("--update", action="store_true", help="write the budgets")
    parser.add_argument("--no-values", action="store_true", help="compile only")
    parser.add_argument("--compile", nargs=2, metavar=("CHIP", "CASE"))
    args = parser.parse_args(argv)
    if args.compile:
        compile_case(*args.compile)
        return 0
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if not args.no_values:
        values()
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    found, wrong = {}, []
    for chip in args.chips.split(","):
        for name in args.cases.split(","):
            began = time.perf_counter()
            own = compiled(chip, name)
            found.setdefault(chip, {})[name] = own
            if args.update:
                budgets.setdefault(chip, {})[name] = own
                BUDGETS.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")
            limits = budgets.get(chip, {}).get(name, {})
            wrong += [f"{chip} {name} {text}" for text in breaches(own, limits)]
            took = time.perf_counter() - began
            print(f"compiled: {name} for {chip} ({took:.0f} s)", flush=True)
    print(table(found))
    print("\n".join(wrong) or "every kernel is within its budget, none spills")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
