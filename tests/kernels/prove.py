"""`make kernels`: the kernels' values, and what compilers make of them.

Values are checked on the CPU against the dense oracle, with the TPU simulator's race
detector for a few (those of the GPU kernels are in `make test-all`). Then each kernel
is compiled, at the size of real use, for chips that are not here, and what comes out is
held against `budgets.json`: spills, and of a TPU bundles, vector and scalar memory, of
a GPU registers, instructions and shared memory. A case is compiled in a process of its
own, whose compiler writes what it made to a folder that is thrown away.

    python -m tests.kernels.prove [--chips=v5e,h200] [--cases=window] [--update]
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
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "h200": ""}
# What fails where it grows; a spill fails at once.
MEASURES = {
    "tpu": ("bundles", "vmem", "smem"),
    "gpu": ("registers", "instructions", "smem"),
}
SLACK = 1.02
ENGINE = "engine"  # the engine's calls over a model: 32k slots, chunks of 512
LIBRARY = "library"  # dense attention by cuDNN or splash
SCAN = "scan"  # the case of the selective scan: 32k tokens, 8,192 channels, 16 states
LIBRARIES = {"tpu": "splash", "gpu": "cudnn"}
# Attention of one token over a cache: slots, and what else the case has.
DECODE = {
    "decode": (131_072, {}),
    "decode_float32": (32_768, dict(dtype="float32")),
    "decode_sums": (4096, dict(sums=True)),
    "decode_codes": (131_072, dict(codes=True)),
    "quest": (131_072, dict(page=16, count=256)),
    "quest_float32": (32_768, dict(page=16, count=64, dtype="float32")),
    "quest_codes": (131_072, dict(page=32, count=128, codes=True)),
}


def platform(chip: str) -> str:
    """Whose kernels a chip runs: "tpu" or "gpu"."""
    return "gpu" if chip == "h200" else "tpu"


def cases() -> dict:
    """Name -> (mask, tokens, query heads, kv heads, width, options) of attention."""
    from pallas_kernels import mask as M

    sinks = M.causal() & (M.window(4096) | M.sink(4))
    stripes = M.causal() & M.block_sparse(128, 4, 8, kv_heads=2)
    near = M.causal() & M.window(4096)
    packed = dict(segments=True, sink=True, softcap=30.0)
    return {
        "causal": (M.causal(), 32_768, 8, 2, 128, {}),
        LIBRARY: (M.causal(), 32_768, 8, 2, 128, dict(alone=True)),
        "window": (sinks, 1_048_576, 8, 2, 128, {}),
        "stripes": (stripes, 32_768, 8, 2, 128, {}),
        "packed": (near, 32_768, 8, 8, 64, packed),
        "packed_wide": (near, 32_768, 8, 2, 128, packed | dict(only="gpu")),
    }


def device(chip: str):
    """A device that is not here."""
    from jax.experimental import topologies

    if platform(chip) == "tpu":
        found = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
        return found.devices[0]
    target = (ROOT / "lclm" / "train" / f"{chip}.txtpb").read_text()
    found = topologies.get_topology_desc(
        platform="cuda", target_config=target, topology="1x1x1"
    )
    return found.devices[0]


def compile_case(chip: str, name: str) -> None:
    """Compile one case's forward and backward pass for a chip (in a child process)."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels import dispatch

    place = SingleDeviceSharding(device(chip))
    if name == ENGINE:
        compile_engine(chip, place)
        return

    def array(shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    which = platform(chip)
    make = scan_case if name == SCAN else attention_case
    make = decode_case if name in DECODE else make
    kernel = LIBRARIES[which] if name == LIBRARY else f"mosaic_{which}"
    run, args = make(kernel, name, array)
    with dispatch.target(which, chip):
        lowered = jax.jit(run).lower(*args)
    lowered.compile()
    if kernel == "cudnn" and "__cudnn$fmhaSoftmaxBackward" not in lowered.as_text():
        raise SystemExit("cuDNN's gradients were not taken")


def compile_engine(chip: str, place) -> None:
    """Compile what reads a chunk and what decodes, two layers of Llama 3 8B.

    What decodes may copy no cache: SystemExit where it takes an eighth of one beside.
    """
    import dataclasses

    from lclm.models.presets import preset
    from tests.serve.lowering import engine_calls

    config = preset("llama-3-8b")
    (run,) = config.stack
    config = dataclasses.replace(config, stack=(dataclasses.replace(run, repeats=2),))
    keys = 32_768 * 8 * 128 * 2
    sizes = {"length": 32_768, "chunk": 512, "place": place, "chip": chip}
    calls = engine_calls(config, "full", platform(chip), **sizes)
    _, write = (call.lower().compile().memory_analysis() for call in calls)
    if write.temp_size_in_bytes > keys // 8:
        raise SystemExit(f"{write.temp_size_in_bytes} bytes beside caches of {keys}")


def scan_case(implementation: str, name: str, array):
    """A selective scan without and with its gradients, and its arguments."""
    import jax

    from pallas_kernels.selective_scan import kernel

    B, T, C, N = 1, 32_768, 8192, 16
    scan = kernel((B, T, C), N, "float32", implementation)
    tokens, states = array((B, T, C)), array((B, T, N))
    args = [tokens, tokens, array((N, C)), states, states, array((B, N, C))]

    def run(keep, cotangents, *args):
        outs, back = jax.vjp(lambda *args: scan(*args, keep), *args)
        return scan(*args, keep), outs, back(cotangents)

    return run, (array((B, T)), (tokens, args[-1]), *args)


def coded(array, shape, dtype):
    """A buffer of codes, a scale for each slot and 32 channels."""
    import jax

    from lclm.ops import codes

    zeros = jax.eval_shape(lambda: codes.zeros(shape, 8, (1, 32), dtype))
    return jax.tree.map(lambda x: array(x.shape, x.dtype), zeros)


def decode_case(implementation: str, name: str, array):
    """A token's attention over a cache, 32 heads over 8 of width 128."""
    from pallas_kernels import decode

    C, options = DECODE[name]
    B, N, K, H = 1, 32, 8, 128
    dtype = options.get("dtype", "bfloat16")
    q, kv = array((B, 1, N, H), dtype), array((B, K, C, H), dtype)
    if options.get("codes"):
        kv = coded(array, kv.shape, dtype)
    at, length = array((B, 1), "int32"), array((B,), "int32")
    shared = {"implementation": implementation}
    if "page" in options:
        page = options["page"]
        kind = "float32" if options.get("codes") else dtype
        bounds = array((B, K, C // page, 2 * H), kind)
        choice = decode.Selection(page, options["count"])

        def pages(q, k, v, bounds, at, length):
            return decode.paged_attention(
                q, k, v, bounds, at, choice, length=length, **shared
            )

        return pages, (q, kv, kv, bounds, at, length)
    places = array((B, K if options.get("sums") else 1, C), "int32")

    def run(q, k, v, at, places, beside, length):
        more = {"length": length, **shared}
        if options.get("sums"):
            return decode.attention_and_sums(q, k, v, at, places, beside, **more)
        return decode.cached_attention(q, k, v, at, places, **more)

    return run, (q, kv, kv, at, places, array((B, N, 1)), length)


def attention_case(implementation: str, name: str, array):
    """Attention with its gradients, and its arguments."""
    import jax

    from pallas_kernels.attention import attention

    mask, T, N, K, H, options = cases()[name]
    dtype = options.get("dtype", "bfloat16")
    q, kv = array((1, T, N, H), dtype), array((1, T, K, H), dtype)
    ids = array((1, T), "int32") if options.get("segments") else None
    sink = array((N,)) if options.get("sink") else None

    def run(q, k, v, sink, ids, d_out, d_lse):
        def attend(q, k, v, sink):
            return attention(
                q, k, v, mask=mask, softcap=options.get("softcap"), sink=sink,
                q_segment_ids=ids, kv_segment_ids=ids, implementation=implementation,
            )  # fmt: skip

        if options.get("alone"):  # without a cotangent of the log-sum-exp
            out, back = jax.vjp(lambda *args: attend(*args)[0], q, k, v, sink)
            return out, back(d_out)
        outs, back = jax.vjp(attend, q, k, v, sink)
        return outs, back((d_out, d_lse))

    return run, (q, kv, kv, sink, ids, q, array((1, N, T)))


def taken(chip: str) -> list[str]:
    """The cases that a chip's kernels take."""
    own = cases() | DECODE
    own = {n: c for n, c in own.items() if c[-1].get("only") in (None, platform(chip))}
    if platform(chip) == "gpu":
        own = {n: c for n, c in own.items() if c[-1].get("dtype") != "float32"}
        own = {n: c for n, c in own.items() if not {"codes", "sums"} & {*c[-1]}}
    return [*own, SCAN, ENGINE]


def measure_gpu(folder: Path) -> dict[str, dict[str, int]]:
    """What the assembler says of each kernel: the largest where there are several."""
    found: dict[str, dict[str, int]] = {}
    for path in folder.glob("*.ptxas"):
        kernel, told = re.sub(r"_\d+$", "", path.stem), path.read_text()
        code = path.with_suffix(".ptx").read_text()
        used = path.with_suffix(".resources.txt").read_text()
        (shared,) = re.findall(r"smem_scratch_bytes=(\d+)", used)
        spilled = re.findall(r"(\d+) bytes spill", told)
        own = found.setdefault(kernel, {})
        for key, value in {
            "registers": int(re.findall(r"Used (\d+) registers", told)[0]),
            "instructions": len(re.findall(r"^\t[@a-z].*;$", code, re.MULTILINE)),
            "spills": max(map(int, spilled)),
            "smem": int(shared),
        }.items():
            own[key] = max(value, own.get(key, 0))
    return found


KERNELS = r"attention_[a-z_]+?|selective_scan(?:_gradients)?|splash_[a-z_]+?"


def measure_tpu(folder: Path) -> dict[str, dict[str, int]]:
    """What a dump says of each kernel: the largest where there are several of one."""
    found: dict[str, dict[str, int]] = {}
    for path in folder.glob("*-final_hlo-static-per-bundle-utilization.txt"):
        kernel = re.search(rf"({KERNELS})_*\.\d", path.name)
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
        own = found.setdefault(kernel[1], {})
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
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "MOSAIC_GPU_DUMP_TO": folder,
        }
        command = [sys.executable, "-m", "tests.kernels.prove", "--compile", chip, name]
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{chip} {name} does not compile:\n{done.stderr[-4000:]}")
        measure = measure_gpu if platform(chip) == "gpu" else measure_tpu
        found = measure(Path(folder))
    if not found and (platform(chip), name) != ("gpu", LIBRARY):
        raise SystemExit(f"{chip} {name}: the compiler wrote no schedule of a kernel")
    return found


def breaches(found: dict, budgets: dict) -> list[str]:
    """What of a chip's case is over its budget, or has none; splash may be as it is."""
    wrong = []
    for kernel, own in found.items():
        if kernel.startswith("splash"):
            continue
        if own["spills"]:
            wrong.append(f"{kernel}: {own['spills']} spills")
        for key in own.keys() - {"spills"}:
            most = budgets.get(kernel, {}).get(key)
            if most is None:
                wrong.append(f"{kernel}: no budget of {key}")
            elif own[key] > most * SLACK:
                wrong.append(f"{kernel}: {own[key]:,} {key}, budget {most:,}")
    return wrong


def table(everything: dict) -> str:
    """The figures as a Markdown table for each platform; memory is in bytes."""
    lines = []
    for which, measures in MEASURES.items():
        rows = [
            (chip, name, kernel, own)
            for chip, found in everything.items()
            for name, kernels in found.items()
            for kernel, own in sorted(kernels.items())
            if platform(chip) == which
        ]
        if rows:
            heads = ("chip", "case", "kernel", "spills", *measures)
            lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for *names, own in rows:
            cells = [f"{own[key]:,}" for key in ("spills", *measures)]
            lines.append("| " + " | ".join([*names, *cells]) + " |")
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
    parser.add_argument("--cases", help="names; those that a chip takes")
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
        for name in args.cases.split(",") if args.cases else taken(chip):
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
