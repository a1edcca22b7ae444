"""Every recipe of `configs/` once, at the size of a CPU, and a table of what it gave.

    python experiments/recipes/run.py                (about an hour of 2 CPU cores)
    python experiments/recipes/run.py longgen pi     (those alone, and the table)

A recipe that has finished is not run again. Writes results.md beside this file.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RUNS = Path("runs/recipes")
FINE = "yarn_finetune.py:size=cpu"
RECIPES = {
    "pi": f"{FINE},rope=linear,factor=4.0",
    "ntk": f"{FINE},rope=ntk,factor=4.0",
    "yarn": f"{FINE},rope=yarn,factor=4.0",
    "theta": f"{FINE},rope=default,theta=8e6",
    "longlora": "longlora.py:size=cpu",
    "prolong-1": "prolong_stage1.py:size=cpu",
    "prolong-2": f"prolong_stage2.py:size=cpu,start={RUNS}/prolong-1",
    "prolong-sft": f"prolong_sft.py:size=cpu,start={RUNS}/prolong-2,"
    f"data=chat:path={RUNS}/chats.jsonl",
    "longgen": "longgen.py:size=cpu",
    "longgen-blocks": "longgen.py:size=cpu,hybrid=longgen_blocks",
    "infini": "longgen.py:size=cpu,hybrid=infini",
    "sink-zero": "learned_sink.py:size=cpu,sink=zero",
    "sink-learned": "learned_sink.py:size=cpu,sink=learned",
    "sink-token": "learned_sink.py:size=cpu,sink=token",
    "pretrain-hybrid": "pretrain.py:size=cpu,model=tiny-bytes-hybrid",
}
COLUMNS = ("recipe", "config", "steps x tokens", "seconds a step", "loss", "held out")


def main(names: list[str]) -> int:
    """Run what is asked for and not finished; print and keep the table."""
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        print(f"no recipe {unknown}; known are {sorted(RECIPES)}", file=sys.stderr)
        return 2
    for name in names or RECIPES:
        if not (RUNS / name / "model").exists():
            if "chats.jsonl" in RECIPES[name]:
                write_chats(RUNS / "chats.jsonl")
            config = f"--config=configs/{RECIPES[name]}"
            command = ["lclm", "train", config, f"--workdir={RUNS / name}"]
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)
    done = [name for name in RECIPES if (RUNS / name / "model").exists()]
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(row, done)]
    table = "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
    (HERE / "results.md").write_text(table)
    print(table)
    return 0


def row(name: str) -> tuple[str, ...]:
    """A line of the table: medians of steps, loss of the first and the last fifth."""
    folder = RUNS / name
    run = json.loads((folder / "train.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [r for r in records if "event" not in r]
    looks = [r["nll"] for r in records if r.get("event") == "eval"]
    seconds = statistics.median(r["seconds"] for r in steps[1:])
    part = max(1, len(steps) // 5)
    ends = steps[:part], steps[-part:]
    first, last = (statistics.mean(r["loss"] for r in end) for end in ends)
    return (
        name,
        f"`{RECIPES[name]}`",
        f"{run['steps']} x {run['batch'] * run['length']:,}",
        f"{seconds:.2f}",
        f"{first:.3f} to {last:.3f}",
        f"{looks[0]:.3f} to {looks[-1]:.3f}" if looks else "-",
    )


def write_chats(path: Path, count: int = 200) -> None:
    """Short conversations out of a novel: a passage is asked for and given on."""
    from lclm.data import sources

    words = sources.read("austen:novel=emma").split()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            said = " ".join(words[i * 120 : i * 120 + 60])
            answer = " ".join(words[i * 120 + 60 : i * 120 + 120])
            asked = {"role": "user", "content": f"Continue this passage.\n{said}"}
            given = {"role": "assistant", "content": answer}
            file.write(json.dumps({"messages": [asked, given]}) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
