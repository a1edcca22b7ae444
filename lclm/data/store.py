"""Tokenised documents on disk: ArrayRecord in the layout of TFDS, built once.

A folder appears whole or not at all, under a name that holds a hash of its source, the
tokenizer and the options. TFDS writes and reads it without TensorFlow; a document is
one record for each 65,536 tokens, so that a row reads only what it needs.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lclm.data import corpora
from lclm.data.documents import Document, read_documents
from lclm.data.fetch import cache_folder
from lclm.data.tokens import fingerprint, text_hash, tokenise
from lclm.errors import LclmError, unknown

FORMAT = 1
PIECE = 1 << 16
RECORDS_A_SHARD = 4096
GROUP = 128  # records written at once: every call writes the dataset's metadata anew
TOLD = 20
UNDECODABLE = ("fatal", "skip")

Observe = Callable[["Summary"], None]
"""Called after each document with what there is so far."""


@dataclass
class Summary:
    """What a store holds. `skipped` counts documents, `named` tells of the first."""

    source: str
    tokenizer: str
    documents: int = 0
    characters: int = 0
    tokens: int = 0
    skipped: int = 0
    named: tuple[str, ...] = ()
    dtype: str = "uint16"
    format: int = FORMAT


def stores_folder(root: str | Path = "") -> Path:
    """Where stores are kept: `root`, else `tokens` in the cache."""
    return Path(root).expanduser() if root else cache_folder() / "tokens"


def store_path(
    source: str, tokenizer: Any, *, undecodable: str = "fatal", root: str | Path = ""
) -> Path:
    """The folder of a source's tokens, whether it is there or not."""
    if undecodable not in UNDECODABLE:
        raise unknown("rule for undecodable documents", undecodable, UNDECODABLE)
    told = [FORMAT, PIECE, source, fingerprint(tokenizer), undecodable]
    told.append(_stamp(source))
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9]+", "-", source).strip("-")[:40]
    return stores_folder(root) / f"{name}-{digest}"


def _stamp(source: str) -> list[Any]:
    """What a source's text depends on beside its own words: pins, files, a Python."""
    if "stdlib" in source:
        return [sys.version]
    pins = corpora.pins(source)
    if pins:
        return [repr(pins)]
    found = re.search(r"[:,]path=([^,]*)", source)
    if not found:
        return []
    place = Path(found[1]).expanduser()
    if any(c in place.name for c in "*?["):
        files = sorted(place.parent.glob(place.name))
    else:
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
    kept = [f for f in files if f.is_file()]
    return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in kept]


def open_store(
    source: str,
    tokenizer: Any,
    *,
    undecodable: str = "fatal",
    root: str | Path = "",
    observe: Observe | None = None,
) -> "Store":
    """The tokens of a source; tokenised first where that has not been done.

    Raises:
      LclmError: the source cannot be read, has an undecodable document and these are
        "fatal", or the disk is full; nothing is left that could be taken for a store.
    """
    path = store_path(source, tokenizer, undecodable=undecodable, root=root)
    if not (path / "summary.json").is_file():
        _build(path, source, tokenizer, undecodable, observe or (lambda _: None))
    return Store(path)


def _build(
    path: Path, source: str, tokenizer: Any, undecodable: str, observe: Observe
) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".building-", dir=path.parent
        ) as scratch:
            target = Path(scratch) / "store"
            target.mkdir()
            _write(target, source, tokenizer, undecodable, observe)
            with contextlib.suppress(FileExistsError):
                # Whoever is first wins: the same source gives the same tokens.
                os.rename(target, path)
    except OSError as error:
        if (path / "summary.json").is_file():
            return
        raise LclmError(
            f"the tokens of {source!r} cannot be written to {path.parent}: "
            f"{error.strerror or error}; free some space, or name another folder"
        ) from error


def _write(
    folder: Path, source: str, tokenizer: Any, undecodable: str, observe: Observe
) -> None:
    wide = getattr(tokenizer, "vocab_size", 1 << 16) > 1 << 16
    summary = Summary(source, fingerprint(tokenizer))
    summary.dtype = "uint32" if wide else "uint16"
    writer = _writer(folder, np.dtype(summary.dtype))
    lengths, hashes, records = [], [], []
    for document in _kept(source, undecodable, summary):
        tokens, mask = tokenise(document, tokenizer)
        for start in range(0, max(len(tokens), 1), PIECE):
            at = slice(start, start + PIECE)
            records.append({
                "id": document.id,
                "start": start,
                "length": len(tokens),
                "tokens": tokens[at].astype(summary.dtype),
                "mask": np.zeros(0, np.uint8) if mask is None else mask[at],
            })  # fmt: skip
            if len(records) == GROUP:
                writer.add_examples({"train": records})
                records = []
        lengths.append(len(tokens))
        hashes.append(text_hash(document.text))
        summary.documents += 1
        summary.tokens += len(tokens)
        if isinstance(document.text, str):
            summary.characters += len(document.text)
        else:
            summary.characters += sum(len(m["content"]) for m in document.text)
        observe(summary)
    if not lengths:
        raise LclmError(
            f"{source!r} has no document ({summary.skipped} were undecodable); give a "
            "source with text in it"
        )
    if records:
        writer.add_examples({"train": records})
    writer.close_all()
    np.save(folder / "lengths.npy", np.array(lengths, np.int64))
    np.save(folder / "hashes.npy", np.array(hashes, np.uint64))
    text = json.dumps(asdict(summary), indent=2, ensure_ascii=False)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    for file in folder.iterdir():
        with open(file, "rb") as written:
            os.fsync(written.fileno())


def _kept(source: str, undecodable: str, summary: Summary) -> Iterator[Document]:
    for document in read_documents(source):
        if document.text is not None:
            yield document
            continue
        told = f"{document.id}: {document.problem}"
        if undecodable == "fatal":
            raise LclmError(
                f"{source!r} has a document that cannot be read, {told}; mend it, or "
                "set data.undecodable='skip' to leave such documents out"
            )
        summary.skipped += 1
        if len(summary.named) < TOLD:
            summary.named += (told,)


def prepare() -> None:
    """Import all that reads and writes stores, before any other thread runs.

    TFDS imports its parts when they are first used, and while one is on its way the
    imports of other threads (a progress line's) fail.
    """
    import tensorflow_datasets as tfds

    _ = tfds.builder_from_directory, tfds.core.SequentialWriter, tfds.features.Text


def _writer(folder: Path, dtype: np.dtype) -> Any:
    """TFDS's writer of one record after the other.

    Its builders sort what they write, in memory up to 1 GB and with TensorFlow beyond.
    """
    import tensorflow_datasets as tfds

    def array(kind: Any) -> Any:
        encoding = tfds.features.Encoding.BYTES
        return tfds.features.Tensor(shape=(None,), dtype=kind, encoding=encoding)

    features = tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "start": np.int64,
            "length": np.int64,
            "tokens": array(dtype.type),
            "mask": array(np.uint8),
        }
    )
    identity = tfds.core.DatasetIdentity(
        name="tokens",
        version=tfds.core.Version(f"{FORMAT}.0.0"),
        data_dir=str(folder),
        module_name="",
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    writer = tfds.core.SequentialWriter(
        info, max_examples_per_shard=RECORDS_A_SHARD, file_format="array_record"
    )
    writer.initialize_splits(["train"])
    return writer


class Store:
    """Tokenised documents by number, read from disk in parts; threads may share it."""

    def __init__(self, path: Path):
        self.path = path
        self.summary = read_summary(path)
        self.lengths = np.load(path / "lengths.npy")
        self.hashes = np.load(path / "hashes.npy")
        records = np.maximum(-(-self.lengths // PIECE), 1)
        self._first = np.cumsum(records) - records
        self._source, self._lock = None, threading.Lock()

    def _records(self) -> Any:
        with self._lock:
            if self._source is None:
                import tensorflow_datasets as tfds

                builder = tfds.builder_from_directory(self.path)
                self._source = builder.as_data_source(split="train")
        return self._source

    def __len__(self) -> int:
        return len(self.lengths)

    def id(self, doc: int) -> str:
        """The name of a document."""
        return self._records()[int(self._first[doc])]["id"].decode()

    def read(self, doc: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of a part of a document."""
        count = max(min(count, int(self.lengths[doc]) - start), 0)
        first, last = start // PIECE, (start + max(count, 1) - 1) // PIECE
        at = int(self._first[doc])
        found = [self._records()[at + i] for i in range(first, last + 1)]
        inside = slice(start - first * PIECE, start - first * PIECE + count)
        tokens = np.concatenate([r["tokens"] for r in found])[inside]
        mask = np.concatenate([r["mask"] for r in found])[inside]
        if not len(mask):
            mask = np.ones(len(tokens), np.uint8)
        return tokens.astype(np.int32), mask


def read_summary(path: Path) -> Summary:
    """What a store says of itself."""
    told = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    return Summary(**{**told, "named": tuple(told["named"])})


def list_stores(root: str | Path = "") -> dict[Path, Summary]:
    """Every whole store of a folder."""
    found = sorted(stores_folder(root).glob("*/summary.json"))
    return {f.parent: read_summary(f.parent) for f in found}


def remove_unfinished(root: str | Path = "") -> int:
    """Remove what interrupted builds left, and return how many there were."""
    left = [p for p in stores_folder(root).glob(".building-*") if p.is_dir()]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return len(left)
