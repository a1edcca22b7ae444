"""lclm's tasks as lm-eval's documents: made when asked for, scored by our metrics.

A task's settings stand under its name in lm-eval's metadata; its tokenizer is that of
`pretrained`, which lm-eval passes on from the model's arguments.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from lclm.config import from_dict
from lclm.errors import LclmError, unknown
from lclm.evals import metrics, needle, passkey
from lclm.evals.base import Example, Query
from lclm.evals.longbench import LongBench
from lclm.evals.longbench_tasks import DATASETS
from lclm.evals.ruler import Ruler

Row = dict[str, Any]

# Task or group -> the settings of its evaluation that lm-eval leaves open.
SETTINGS = {
    "lclm_passkey": ("lengths", "depths", "bins", "trials", "seed"),
    "lclm_needle": ("lengths", "at", "points", "spacing", "trials", "source", "seed"),
    "lclm_niah": ("lengths", "samples", "source", "seed"),
    "lclm_longbench_mini": ("folder", "limit"),
}


def make_passkey(**told: Any) -> Any:
    """The dataset of `lclm_passkey`."""
    return _dataset(passkey_rows(told))


def make_needle(**told: Any) -> Any:
    """The dataset of `lclm_needle`."""
    return _dataset(needle_rows(told))


def make_niah(**told: Any) -> Any:
    """The dataset of one of RULER's needles, named by `task`."""
    return _dataset(niah_rows(told))


def make_longbench(**told: Any) -> Any:
    """One of the datasets in a folder of LongBench's form, named by `dataset`."""
    return _dataset(longbench_rows(told))


def passkey_rows(told: Row) -> list[Row]:
    """A grid of lengths and depths."""
    job = _evaluation(passkey.Passkey, "lclm_passkey", told)
    codec, starts = _tokenizer(told)
    return _grid(job, functools.partial(passkey.make, codec, starts=starts))


def needle_rows(told: Row) -> list[Row]:
    """A grid of lengths and depths in a real text."""
    job = _evaluation(needle.Needle, "lclm_needle", told)
    codec, starts = _tokenizer(told)
    hay = job.haystack(codec)
    return _grid(job, functools.partial(needle.make, codec, hay, starts=starts))


def niah_rows(told: Row) -> list[Row]:
    """The samples of one task at every length."""
    job = _evaluation(Ruler, "lclm_niah", told, tasks=[told["task"]])
    items = job.items(*_tokenizer(told))
    return [_row(item.make(), length=item.key["length"]) for item in items]


def longbench_rows(told: Row) -> list[Row]:
    """The lines of one dataset."""
    name = "lclm_longbench_mini"
    job = _evaluation(LongBench, name, told, datasets=[told["dataset"]])
    rows = []
    for item in job.items():
        example = item.make()
        for query in example.queries:
            classes, dataset = query.meta["classes"], query.meta["dataset"]
            row = _row(example, query, length=item.key["length"])
            rows.append({**row, "classes": list(classes), "dataset": dataset})
    return rows


def score_passkey(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """1 if the first run of digits is the key."""
    return {"score": passkey.score(_query(doc), results[0])}


def score_needle(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """The share of the values that are found."""
    return {"score": needle.score(_query(doc), results[0])}


def score_niah(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """The share of the wanted strings that occur."""
    return {"score": metrics.contains_all(results[0], doc["answers"])}


def score_longbench(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """The dataset's own metric, the best over the wanted answers."""
    dataset = DATASETS[doc["dataset"]]
    return {"score": dataset.score(results[0], doc["answers"], doc["classes"])}


def _evaluation(kind: type, name: str, told: Row, **fixed: Any) -> Any:
    """The evaluation with the settings that stand under its name."""
    settings = told.get(name, {})
    if not isinstance(settings, dict):
        raise LclmError(
            f"{name} is {settings!r}; give an object of settings, as in "
            f'--metadata \'{{"{name}": {{"{SETTINGS[name][0]}": ...}}}}\''
        )
    for key in settings:
        if key not in SETTINGS[name]:
            raise unknown(f"setting of {name}", key, SETTINGS[name])
    return from_dict(kind, {**settings, **fixed})


def _grid(job: Any, make: Callable[..., Example]) -> list[Row]:
    rows = []
    for cell in job.cells():
        where = {"length": cell.length, "depth": cell.depth, "seed": cell.seed}
        rows.append(_row(make(**where), **where))
    return rows


def _tokenizer(told: Row) -> tuple[Any, int]:
    """The model's tokenizer, and how many tokens it puts before a text."""
    if not isinstance(source := told.get("pretrained"), str):
        raise LclmError(
            "lclm's tasks are made to a length in tokens: name the model whose tokens "
            'count, --metadata \'{"pretrained": "smollm2-135m"}\''
        )
    return _read(source)


@functools.cache
def _read(source: str) -> tuple[Any, int]:
    from lclm.cli.data import find_tokenizer

    codec = find_tokenizer(source)
    return codec, int(codec.add_bos)


def _row(example: Example, query: Query | None = None, **where: Any) -> Row:
    query = query or example.query
    prompt = example.opening + example.context + query.text
    return {"input": prompt, "answers": list(query.answers), **where}


def _query(doc: Row) -> Query:
    return Query("", tuple(doc["answers"]))


def _dataset(rows: list[Row]) -> Any:
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}
