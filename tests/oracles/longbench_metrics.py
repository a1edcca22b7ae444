"""Scores of LongBench's metrics by the packages it uses, on texts made to trip them.

    python tests/oracles/longbench_metrics.py [--check]

lm-eval 0.4.13 carries the metrics with the packages `rouge`, `fuzzywuzzy` and `jieba`
behind them; its wheel is downloaded for that one file and nothing of it is installed.
Writes tests/golden/longbench_metrics.json.
"""

# ruff: noqa: RUF001 - Chinese marks look like others.
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden" / "longbench_metrics.json"
MEMBER = "lm_eval/tasks/longbench/metrics.py"
EN = (
    "the a An river Rose rose, over fields. fields! 12 7 x_1 state-of-the-art U.S. "
    "café 'quoted' Paragraph 3 and"
).split()
ZH = "今天天气很好，我们去公园散步。会议讨论了预算、人员《安排》！第12段落3"
CODE = ["x = 1", "", "# note", "return foo(x)", "`tick`", "a // b", "for i in n:", "  "]
CLASSES = ["Location", "Loc", "abc", "Person", "Other location", "Date", "Da", "te"]


def reference():
    """The metrics module inside the wheel of lm-eval."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        subprocess.run([*pip, "--dest", folder, "lm-eval==0.4.13"], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        path = Path(folder) / "metrics.py"
        path.write_bytes(zipfile.ZipFile(wheel).read(MEMBER))
        spec = importlib.util.spec_from_file_location("longbench_reference", path)
        module = importlib.util.module_from_spec(spec)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec.loader.exec_module(module)
    return module


def words(rng: random.Random, low: int, high: int) -> str:
    """A run of words with stops, doubled spaces and newlines among them."""
    parts = [rng.choice(EN) + rng.choice((" ", " ", ". ", "  ", "\n")) for _ in EN]
    return "".join(parts[: rng.randint(low, high)])


def chinese(rng: random.Random) -> str:
    """Pieces of Chinese with marks, spaces and stops of both kinds."""
    at = [rng.randrange(len(ZH) - 6) for _ in range(rng.randint(0, 4))]
    return "".join(ZH[i : i + rng.randint(1, 6)] + rng.choice("  .。") for i in at)


def cases(rng: random.Random):
    """(metric, prediction, wanted, classes or None)."""
    for _ in range(30):
        for metric in ("qa_f1", "rouge"):
            yield metric, words(rng, 0, 12), words(rng, 1, 12), None
        for metric in ("qa_f1_zh", "rouge_zh"):
            yield metric, chinese(rng), chinese(rng), None
        lines = [x for x in rng.sample(CODE, 4) if x.strip()]
        yield "code_similarity", "\n".join(lines), rng.choice(CODE[:4:3]), None
        named = " ".join(rng.sample(CLASSES, rng.randint(0, 4)))
        listed = rng.sample(CLASSES, len(CLASSES))
        yield "classification", named, rng.choice(CLASSES), listed
        drawn = [rng.choice((1, 3, 12)) for _ in range(rng.randint(0, 4))]
        numbers = " ".join(map(str, drawn))
        yield "count", numbers, str(rng.choice((1, 3))), None
        yield "retrieval", f"Paragraph {numbers}", "Paragraph 3", None
        yield "retrieval_zh", f"段落{numbers}", "段落12", None
    for text in ("", " ", ".", "...", ". .", "a", "The.", "same words. same words."):
        for metric in ("qa_f1", "rouge", "rouge_zh"):
            yield metric, text, "same words.", None
    yield "classification", "abc Location", "Location", ["Location", "Loc", "abc"]


def vectors() -> list[dict]:
    """Every case with its score."""
    module = reference()
    names = {"code_similarity": "code_sim"}
    found = []
    for metric, prediction, wanted, classes in cases(random.Random(0)):
        score = getattr(module, f"{names.get(metric, metric)}_score")
        options = {"all_classes": classes} if classes else {}
        told = {"metric": metric, "prediction": prediction, "wanted": wanted}
        if classes:
            told["classes"] = classes
        if metric.endswith("_zh") and metric != "retrieval_zh":
            texts = (prediction, wanted)
            told["words"] = {t: list(module.jieba.cut(t)) for t in texts}
        found.append({**told, "score": float(score(prediction, wanted, **options))})
    return found


if __name__ == "__main__":
    found = vectors()
    if "--check" in sys.argv:
        assert json.loads(GOLDEN.read_text()) == found, "the goldens have changed"
    else:
        lines = ",\n".join(json.dumps(v, ensure_ascii=False) for v in found)
        GOLDEN.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{len(found)} vectors agree")
