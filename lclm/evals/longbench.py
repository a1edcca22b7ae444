"""LongBench v1 and LongBench-E (arXiv 2308.14508) from the benchmark's own files."""

import json
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lclm.errors import LclmError, unknown
from lclm.evals import metrics
from lclm.evals.asking import NOTES
from lclm.evals.base import (
    Example,
    Panel,
    Query,
    Record,
    Summary,
    require,
    to_csv,
)
from lclm.evals.exam import Examination, Item, fingerprint, mean, ways
from lclm.evals.lines import read_lines, texts
from lclm.evals.longbench_tasks import BUCKETS, DATASETS, bucket

FIELDS = {
    "input": str,
    "context": str,
    "answers": list,
    "length": int,
    "all_classes": (list, type(None)),
}
PROMPTS, NEW_TOKENS = "dataset2prompt.json", "dataset2maxlen.json"


@dataclass(frozen=True)
class Settings:
    """Templates and answer lengths by dataset: the folder's own, else ours."""

    prompts: dict[str, str] = field(default_factory=dict)
    new_tokens: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Settings":
        """What the folder, or `config` in it, has of LongBench's two config files."""
        return cls(_config(folder, PROMPTS, str), _config(folder, NEW_TOKENS, int))

    def prompt(self, dataset: str) -> str:
        """A template with {context} in it."""
        return self.prompts.get(dataset, DATASETS[dataset].prompt)


def _config(folder: Path, name: str, kind: type) -> dict[str, Any]:
    path = next((p for p in (folder / "config" / name, folder / name) if p.is_file()),
                None)  # fmt: skip
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LclmError(f"{path} is not JSON ({error}): fetch it again") from error
    good = isinstance(found, dict) and all(isinstance(v, kind) for v in found.values())
    require(good, f"{path}: expected an object of {kind.__name__} by dataset")
    for dataset, text in found.items():
        if kind is str and text.count("{context}") != 1:
            raise LclmError(f"{path}: the prompt of {dataset} needs one {{context}}")
    return found


def files(folder: Path, *, extended: bool) -> dict[str, Path]:
    """Dataset -> its file in the folder or in `data` in it, in the table's order."""
    end = "_e.jsonl" if extended else ".jsonl"
    places = [folder / "data", folder]
    found = {}
    for name, dataset in DATASETS.items():
        paths = [place / f"{name}{end}" for place in places]
        path = next((p for p in paths if p.is_file()), None)
        if path is not None and (dataset.extended or not extended):
            found[name] = path
    return found


def read_dataset(name: str, path: Path, settings: Settings, limit: int) -> list[Item]:
    """The questions of one file; neighbours about one text share an example."""
    dataset = DATASETS[name]
    opening, rest = settings.prompt(name).split("{context}")
    groups: dict[tuple, list[Query]] = {}
    first: dict[tuple, int] = {}
    for count, (number, line) in enumerate(read_lines(path, FIELDS)):
        if limit and count == limit:
            break
        where = f"{path} line {number}"
        classes = line["all_classes"] or []
        if dataset.metric == "classification":
            texts(classes, f"{where}: all_classes")
        answers = texts(line["answers"], f"{where}: answers")
        if dataset.metric in ("retrieval", "retrieval_zh"):
            label = metrics.LABELS[dataset.language]
            good = all(label.search(a) for a in answers)
            require(good, f"{where}: answers are {answers}; they name no paragraph")
        query = Query(
            rest.replace("{input}", line["input"]),
            answers,
            settings.new_tokens.get(name, dataset.new_tokens),
            asked=line["input"],
            meta={"id": line.get("_id", ""), "classes": classes},
        )
        asked = opening.replace("{input}", line["input"])
        key = (asked, line["context"], line["length"])
        groups.setdefault(key, []).append(query)
        first.setdefault(key, number)
    return [_item(name, first[k], k, queries) for k, queries in groups.items()]


def _item(name: str, number: int, key: tuple, queries: list[Query]) -> Item:
    opening, context, length = key
    meta = {"dataset": name, "chat": DATASETS[name].chat}
    queries = [Query(**{**vars(q), "meta": {**q.meta, **meta}}) for q in queries]
    example = Example(context, tuple(queries), opening, meta)
    told = {"example": f"{name}:{number}:{fingerprint(example)}", "length": length}
    return Item(told, lambda: example, len(queries))


@dataclass(frozen=True)
class LongBench(Examination):
    """Scores by dataset, category and language, or by length bucket (`extended`).

    folder: the benchmark's files, `data/NAME.jsonl` and `config/*.json`. limit: the
    first so many lines of each dataset. budget: tokens of a prompt; what is longer is
    cut in its middle unless `strategies` say otherwise.
    """

    folder: str
    datasets: tuple[str, ...] = ()
    extended: bool = False
    limit: int = 0
    _: KW_ONLY
    budget: int = 7500
    strategies: tuple[str, ...] = ("truncate",)

    task: ClassVar = "longbench"
    SCOPE: ClassVar = ("folder", "extended", "budget", "chat")

    def __post_init__(self):
        folder = Path(self.folder).expanduser()
        require(folder.is_dir(), f"no folder {self.folder!r}: give folder=LONGBENCH")
        for name in self.datasets:
            if name not in DATASETS:
                raise unknown("dataset of LongBench", name, DATASETS)
        require(self.limit >= 0, f"limit is {self.limit}; 0 for all, or more")
        require(
            "oracle" not in self.strategies,
            "LongBench does not say where an answer stands: no strategy 'oracle' here",
        )
        found = files(folder, extended=self.extended)
        missing = [n for n in self.datasets if n not in found]
        which = "_e.jsonl" if self.extended else ".jsonl"
        require(
            bool(found) and not missing,
            f"{self.folder!r} has no {', '.join(missing) or 'dataset'}{which}, nor has "
            f"data/ in it; there are {', '.join(found) or 'none'}",
        )
        self.exam()

    @property
    def title(self) -> str:
        """What the tables call the files: LongBench, -E of it, or LongBench-mini."""
        readme = Path(self.folder).expanduser() / "README.md"
        mini = readme.is_file() and readme.read_bytes().startswith(b"LongBench-mini")
        return "LongBench" + ("-mini" if mini else "") + ("-E" if self.extended else "")

    def items(self, tokenizer: object = None, starts: int = 0) -> list[Item]:
        """Every question, checked; dataset by dataset."""
        folder = Path(self.folder).expanduser()
        settings = Settings.read(folder)
        found = files(folder, extended=self.extended)
        return [
            item
            for name in self.datasets or found
            for item in read_dataset(name, found[name], settings, self.limit)
        ]

    def grade(self, query: Query, answer: str) -> float:
        """The dataset's own metric, the best over the wanted answers."""
        dataset = DATASETS[query.meta["dataset"]]
        return dataset.score(answer, query.answers, query.meta["classes"])

    def summary(self, records: Sequence[Record], *, trained: int) -> Summary:
        """A row for each dataset and mean, a column for each way of reading."""
        found = ways(records)
        if self.extended:
            panels = [_buckets(name, mine, self.title) for name, mine in found]
        else:
            panels = [_scores(found, self.title)]
        skipped = sum("skipped" in r for r in records)
        notes = [NOTES[self.questions], f"{skipped} questions did not fit.",
                 f"Chinese words by {metrics.segmenter()}."]  # fmt: skip
        last = panels[-1]
        panels[-1] = Panel(last.title, last.columns, last.rows, " ".join(notes))
        header = ("way", "dataset", "metric", "bucket", "score", "n")
        return Summary(
            tuple(panels), {}, {"longbench.csv": to_csv(header, _csv(found))}
        )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{round(100 * value, 2):.2f}"


def _average(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _scores(found: list[tuple[str, list[Record]]], title: str) -> Panel:
    """Datasets, means of categories, and per language the mean of its categories."""
    scores = [
        {n: mean(r for r in mine if r["dataset"] == n) for n in DATASETS}
        for _, mine in found
    ]
    rows = []
    here = [n for n in DATASETS if any(s[n] is not None for s in scores)]
    rows += [(n, *(_percent(s[n]) for s in scores)) for n in here]
    for language in ("en", "zh"):
        of: dict[str, list[str]] = {}
        for name in here:
            if DATASETS[name].language == language:
                of.setdefault(DATASETS[name].category, []).append(name)
        means = [
            {c: _average([s[n] for n in names]) for c, names in of.items()}
            for s in scores
        ]
        rows += [(f"{c} ({language})", *(_percent(m[c]) for m in means)) for c in of]
        if of:
            alls = (_percent(_average(list(m.values()))) for m in means)
            rows.append((f"all ({language})", *alls))
    columns = ("dataset", *(name for name, _ in found))
    return Panel(title, columns, tuple(rows))


def _buckets(way: str, mine: list[Record], title: str) -> Panel:
    rows = []
    for name in DATASETS:
        its = [r for r in mine if r["dataset"] == name]
        if its:
            cells = [mean(r for r in its if bucket(r["length"]) == b) for b in BUCKETS]
            rows.append((name, *(_percent(c) for c in cells)))
    return Panel(f"{title}, {way}", ("dataset", *BUCKETS), tuple(rows))


def _csv(found: list[tuple[str, list[Record]]]) -> list[tuple]:
    lines = []
    for way, mine in found:
        for name, dataset in DATASETS.items():
            its = [r for r in mine if r["dataset"] == name]
            cuts = {"all": its}
            cuts |= {b: [r for r in its if bucket(r["length"]) == b] for b in BUCKETS}
            for cut, part in cuts.items():
                asked = [r for r in part if r["score"] is not None]
                if asked:
                    told = (way, name, dataset.metric, cut)
                    lines.append((*told, round(100 * mean(asked), 2), len(asked)))
    return lines
