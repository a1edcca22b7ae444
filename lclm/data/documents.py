"""Where documents come from: `name:key=value,...` -> their names and texts."""

import glob
import gzip
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lclm.data import sources
from lclm.data.archives import members
from lclm.errors import LclmError
from lclm.registry import Entry, Table

CODE = "py,pyi,c,h,cc,cpp,hpp,js,ts,rs,go,java,rst,md,toml,cfg"

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Document:
    """A text, or a conversation as role/content messages; None with its `problem`."""

    id: str
    text: str | Messages | None
    problem: str = ""


DOCUMENTS = Table(
    "source of documents",
    {
        "jsonl": Entry(
            "lclm.data.documents:jsonl", "JSON lines (path=..., field=text, id=...)"
        ),
        "folder": Entry(
            "lclm.data.documents:folder", "text files (path=..., pattern=**/*.txt)"
        ),
        "hf": Entry(
            "lclm.data.documents:hf", "Hugging Face folder (path=..., split=, field=)"
        ),
        "tfds": Entry(
            "lclm.data.documents:tfds", "TFDS (name=..., split=train, field=text)"
        ),
        "array_record": Entry(
            "lclm.data.documents:array_record", "ArrayRecord files (path=..., field=)"
        ),
        "code": Entry(
            "lclm.data.documents:code", "a repository as one document (path=...)"
        ),
        "package": Entry(
            "lclm.data.corpora:package", "code of a pinned wheel (name=sympy, depth=)"
        ),
        "stdlib": Entry(
            "lclm.data.corpora:stdlib", "this Python's standard library (depth=)"
        ),
        "deb": Entry(
            "lclm.data.corpora:deb", "pages of a pinned Debian package (name=...)"
        ),
        "kjv_books": Entry(
            "lclm.data.corpora:kjv_books", "King James Bible, a document a book"
        ),
        "novels": Entry(
            "lclm.data.corpora:novels", "Jane Austen's six novels (only=...)"
        ),
        "wikipedia_intros": Entry(
            "lclm.data.corpora:wikipedia_intros", "67k short paragraphs of HotpotQA"
        ),
        "book_questions": Entry(
            "lclm.data.questions:book_questions", "instructions made of a book (book=)"
        ),
        "chat": Entry(
            "lclm.data.documents:chat", "instructions with answers (path=..., raw=)"
        ),
    },
)

SYNTHETIC = Table(
    "synthetic source",
    {
        "passkeys": Entry(
            "lclm.data.synthetic:passkeys", "keys hidden in a book (book=, keys=, ...)"
        ),
    },
)


def check(source: str) -> None:
    """Raise what is wrong with a source's name, options or path; reads no text."""
    load, options = sources.bind(_all(), source)
    if kind_of(source) == "synthetic":
        load(**options)
    if "book" in inspect.signature(load).parameters:
        check(options.get("book", inspect.signature(load).parameters["book"].default))


def kind_of(source: str) -> str:
    """text, documents or synthetic: which table a source is in."""
    name = source.partition(":")[0]
    if name in SYNTHETIC.entries:
        return "synthetic"
    return "text" if name in sources.SOURCES.entries else "documents"


def read_documents(source: str) -> Iterator[Document]:
    """The documents of a source, always in the same order; a text is one document."""
    kind = kind_of(source)
    if kind == "text":
        yield Document(source, sources.read(source))
        return
    if kind == "synthetic":
        raise LclmError(
            f"{source!r} makes rows, not documents: use it in a mixture, not as a text"
        )
    load, options = sources.bind(_all(), source)
    yield from load(**options)


def _all() -> Table:
    """Every table, so that an unknown name is told of all known ones."""
    tables = (sources.SOURCES, DOCUMENTS, SYNTHETIC)
    return Table("source", {k: e for table in tables for k, e in table.entries.items()})


def decoded(name: str, raw: bytes) -> Document:
    """A document of UTF-8 bytes; what is not UTF-8 or empty has a problem."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Document(name, None, f"not UTF-8 ({error.reason} at byte {error.start})")
    return Document(name, text) if text.strip() else Document(name, None, "empty")


def files_of(path: str, *patterns: str) -> list[Path]:
    """A file, what a glob finds, or what `patterns` find in a folder; sorted."""
    place = Path(path).expanduser()
    if place.is_dir():
        found = {f for pattern in patterns for f in place.glob(pattern)}
    else:
        found = {Path(f) for f in glob.glob(str(place), recursive=True)}
    files = sorted(f for f in found if f.is_file())
    if not files:
        raise LclmError(
            f"no file in {path!r}: give a file, a glob, or a folder with "
            f"{' or '.join(patterns)}"
        )
    return files


def _records(files: list[Path]) -> Iterator[tuple[str, Any, str]]:
    """(file:line, JSON object or None, problem) of JSON lines, gzip by name."""
    for file in files:
        opener = gzip.open if file.suffix == ".gz" else open
        try:
            with opener(file, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    name = f"{file.name}:{number}"
                    try:
                        record = json.loads(line)
                    except ValueError as error:
                        yield name, None, f"not JSON ({error})"
                        continue
                    good = isinstance(record, dict)
                    problem = "" if good else "not a JSON object"
                    yield name, record if good else None, problem
        except (OSError, EOFError) as error:
            raise LclmError(f"{file} cannot be read: {error}") from error


def _field(name: str, record: Any, field: str, id: str) -> Document:
    value = record.get(field)
    if isinstance(value, bytes):
        return decoded(name, value)
    if not isinstance(value, str) or not value.strip():
        kind = type(value).__name__ if field in record else f"one of {sorted(record)}"
        return Document(name, None, f"field {field!r} has no text, it is {kind}")
    return Document(str(record.get(id, name)) if id else name, value)


def jsonl(path: str, field: str = "text", id: str = "") -> Iterator[Document]:
    """JSON lines, plain or .gz: the text in `field`, its name in `id`."""
    for name, record, problem in _records(
        files_of(path, "**/*.jsonl", "**/*.jsonl.gz", "**/*.json")
    ):
        if record is None:
            yield Document(name, None, problem)
        else:
            yield _field(name, record, field, id)


def folder(path: str, pattern: str = "**/*.txt") -> Iterator[Document]:
    """The files under a folder that match, a document each."""
    root = Path(path).expanduser()
    for file in files_of(path, pattern):
        name = file.relative_to(root).as_posix() if root.is_dir() else file.name
        yield decoded(name, file.read_bytes())


def hf(
    path: str, split: str = "train", field: str = "text", id: str = ""
) -> Iterator[Document]:
    """A local Hugging Face folder: parquet, arrow or JSON-lines shards of a split.

    A shard belongs to a split when its name or its folder's begins with the split's.
    """
    kinds = ("**/*.parquet", "**/*.arrow", "**/*.jsonl", "**/*.jsonl.gz")
    root = Path(path).expanduser()
    found = [f for f in files_of(path, *kinds) if not f.name.startswith("cache-")]
    names = {f: f.relative_to(root) if root.is_dir() else Path(f.name) for f in found}
    chosen = [f for f in found if any(p.startswith(split) for p in names[f].parts)]
    if not chosen:
        raise LclmError(
            f"{path!r} has no shard of split {split!r}: it has "
            f"{sorted(n.as_posix() for n in names.values())[:5]}"
        )
    for file in chosen:
        stem = names[file].as_posix()
        if ".jsonl" in file.suffixes:
            yield from jsonl(str(file), field, id)
            continue
        for number, record in enumerate(_table_rows(file)):
            yield _field(f"{stem}:{number}", record, field, id)


def _table_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise LclmError(
            f"{file} needs pyarrow: `pip install pyarrow`, or save the data as .jsonl"
        ) from error
    try:
        if file.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(file) as table:
                for batch in table.iter_batches():
                    yield from batch.to_pylist()
            return
        with pyarrow.memory_map(str(file)) as mapped:
            for batch in pyarrow.ipc.open_stream(mapped):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise LclmError(f"{file} cannot be read ({error}): fetch it again") from error


def tfds(
    name: str, split: str = "train", field: str = "text", data_dir: str = ""
) -> Iterator[Document]:
    """A prepared TFDS data set with random access; TensorFlow is not needed."""
    import tensorflow_datasets

    try:
        found = tensorflow_datasets.data_source(
            name, split=split, data_dir=data_dir or None, download=False
        )
    except Exception as error:  # the package raises many kinds for what is not there
        raise LclmError(
            f"tfds:name={name},split={split} cannot be opened: {error}; prepare it "
            "first with file_format='array_record', or give its data_dir"
        ) from error
    for number in range(len(found)):
        yield _field(f"{name}/{split}:{number}", found[number], field, "")


def array_record(path: str, field: str = "", id: str = "") -> Iterator[Document]:
    """ArrayRecord files of UTF-8 texts, or of JSON objects where `field` is given."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    for file in files_of(path, "**/*.array_record*", "**/*.arrayrecord*"):
        with ArrayRecordDataSource(str(file)) as records:
            for number in range(len(records)):
                name = f"{file.name}:{number}"
                document = decoded(name, records[number])
                if field and document.text is not None:
                    try:
                        record = json.loads(document.text)
                    except ValueError as error:
                        document = Document(name, None, f"not JSON ({error})")
                    else:
                        document = _field(name, record, field, id)
                yield document


def code(
    path: str, suffixes: str = CODE, depth: str = "0", only: str = ""
) -> Iterator[Document]:
    """A folder, wheel, zip or tarball of code as one document, files under headers.

    depth: parts of a path that make a document of their own (0: one for everything).
    only: documents whose name begins so.
    """
    found = members(Path(path).expanduser())
    name = Path(path).name
    yield from concatenated(name, found, suffixes=suffixes, depth=depth, only=only)


def concatenated(
    name: str,
    files: Iterator[tuple[str, bytes]],
    *,
    suffixes: str,
    depth: str,
    only: str = "",
) -> Iterator[Document]:
    """Files (sorted by path) as documents: each file under a line with its path."""
    if not depth.isdigit():
        raise LclmError(f"{name}: depth is {depth!r}; a whole number, 0 for one text")
    endings = tuple("." + s.strip().lstrip(".") for s in suffixes.split(","))
    groups: dict[str, list[str]] = {}
    for path, raw in files:
        if not path.endswith(endings) or not raw.strip():
            continue
        parents = path.split("/")[:-1][: int(depth)]
        group = "/".join([name, *parents])
        if only and not "/".join(parents).startswith(only):
            continue
        document = decoded(path, raw)
        if document.text is None:
            yield Document(f"{name}/{path}", None, document.problem)
            continue
        groups.setdefault(group, []).append(f"# file: {path}\n{document.text.rstrip()}")
    for group in sorted(groups):
        yield Document(group, "\n\n".join(groups[group]) + "\n")


def chat(path: str, raw: str = "no") -> Iterator[Document]:
    """JSON lines of {"messages": [...]}, or {"prompt", "response"}, to learn answers.

    Only what the assistant says is predicted. Messages are written with the model's
    chat template; raw=yes joins prompt and response as they stand.
    """
    if raw not in ("yes", "no"):
        raise LclmError(f"chat: raw is {raw!r}; yes or no")
    for name, record, problem in _records(
        files_of(path, "**/*.jsonl", "**/*.jsonl.gz")
    ):
        if record is None:
            yield Document(name, None, problem)
            continue
        messages = record.get("messages")
        if messages is None and {"prompt", "response"} <= record.keys():
            messages = [
                {"role": "user", "content": record["prompt"]},
                {"role": "assistant", "content": record["response"]},
            ]
        wrong = _wrong(messages)
        if wrong:
            yield Document(name, None, wrong)
            continue
        if raw == "yes":
            messages = [{**m, "raw": True} for m in messages]
        yield Document(str(record.get("id", name)), messages)


def _wrong(messages: Any) -> str:
    """What is wrong with a conversation, "" for nothing."""
    if not isinstance(messages, list) or not messages:
        return "neither messages nor prompt and response"
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return "a message has no role"
        if not isinstance(message.get("content"), str):
            return f"a message of {message['role']!r} has no text"
    if not any(m["role"] == "assistant" for m in messages):
        return "no message is the assistant's: nothing to learn"
    return ""
