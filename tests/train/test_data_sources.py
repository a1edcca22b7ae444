"""Laws of document sources, their tokens, and the stores these are kept in."""

import gzip
import json
import sys
import tarfile
import zipfile

import numpy as np
import pytest

from lclm.data import pipeline, store
from lclm.data.corpora import plain
from lclm.data.documents import DOCUMENTS, check, read_documents
from lclm.data.pipeline import DataSpec, Part, open_batches
from lclm.data.store import Store, list_stores, open_store, store_path
from lclm.data.tokens import encode, tokenise
from lclm.errors import LclmError
from lclm.hub.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


class Chat(ByteTokenizer):
    """Bytes with a chat template."""

    def chat(self, messages, *, add_generation_prompt=True):
        told = "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
        return told + "<assistant>" * add_generation_prompt


def texts(source: str) -> dict[str, str | None]:
    return {d.id: d.text for d in read_documents(source)}


def lines(path, *records) -> None:
    raw = "\n".join(json.dumps(r) if isinstance(r, dict) else r for r in records)
    opener = gzip.open if path.suffix == ".gz" else open
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(path, "wb") as file:
        file.write(raw.encode())


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    lines(path, *({"text": f"text {i} " * (i + 1), "key": f"k{i}"} for i in range(6)))
    return f"jsonl:path={path},id=key"


def test_json_lines_are_read_plain_zipped_from_folders_and_globs(tmp_path):
    lines(tmp_path / "a.jsonl", {"text": "one"}, "", {"text": "two"})
    lines(tmp_path / "b.jsonl.gz", {"text": "three"})
    both = {"a.jsonl:1": "one", "a.jsonl:3": "two", "b.jsonl.gz:1": "three"}
    assert texts(f"jsonl:path={tmp_path}") == both
    assert texts(f"jsonl:path={tmp_path}/*.gz") == {"b.jsonl.gz:1": "three"}


def test_files_of_a_folder_are_documents_in_order(tmp_path):
    for name in ("b.txt", "sub/a.txt", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    source = f"folder:path={tmp_path}"
    assert list(texts(source).items()) == [(n, n) for n in ("b.txt", "sub/a.txt")]
    assert texts(source + ",pattern=*.md") == {"c.md": "c.md"}


def test_a_hugging_face_folder_gives_the_shards_of_one_split(tmp_path):
    import pyarrow
    import pyarrow.parquet

    data = tmp_path / "data"
    data.mkdir()
    for split, rows in (("train", ["a", "b"]), ("test", ["c"])):
        table = pyarrow.table({"text": rows, "n": list(range(len(rows)))})
        pyarrow.parquet.write_table(table, data / f"{split}-00000-of-00001.parquet")
    with pyarrow.OSFile(str(tmp_path / "train.arrow"), "wb") as file:
        with pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    lines(data / "train-1.jsonl", {"text": "d"})
    assert list(texts(f"hf:path={tmp_path}").values()) == ["a", "b", "d", "c"]
    assert list(texts(f"hf:path={tmp_path},split=test").values()) == ["c"]
    with pytest.raises(LclmError, match="no shard of split"):
        texts(f"hf:path={tmp_path},split=validation")


def test_array_records_hold_texts_or_json(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    path = tmp_path / "x.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for raw in (b'{"body": "one"}', b"two", b"\xff"):
        writer.write(raw)
    writer.close()
    assert list(texts(f"array_record:path={path}").values()) == [
        '{"body": "one"}',
        "two",
        None,
    ]
    found = list(texts(f"array_record:path={path},field=body").values())
    assert found == ["one", None, None]


def test_tfds_is_read_and_no_tensorflow_is_imported(tmp_path):
    import tensorflow_datasets as tfds

    folder = tmp_path / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name="tiny",
        version=tfds.core.Version("1.0.0"),
        data_dir=str(folder),
        module_name="",
    )
    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
    writer = tfds.core.SequentialWriter(
        tfds.core.DatasetInfo(builder=identity, features=features),
        max_examples_per_shard=2,
        file_format="array_record",
    )
    writer.initialize_splits(["train"])
    writer.add_examples({"train": [{"text": t} for t in ("a", "b", "c")]})
    writer.close_all()
    found = texts(f"tfds:name=tiny,data_dir={tmp_path}")
    assert found == {f"tiny/train:{i}": t for i, t in enumerate("abc")}
    with pytest.raises(LclmError, match="cannot be opened"):
        texts(f"tfds:name=absent,data_dir={tmp_path}")
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("kind", ["folder", "repo.whl", "repo.tar.gz"])
def test_a_repository_is_one_document_in_any_wrapping(tmp_path, kind):
    root = tmp_path / "folder"
    files = {"z/b.py": "b = 1\n", "a.py": "a = 1\n\n", "z/c.txt": "c", "d.png": "d"}
    files[".git/e.py"] = "e = 1\n"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    names = [n for n in files if not n.startswith(".git")]
    if kind.endswith("whl"):
        with zipfile.ZipFile(tmp_path / kind, "w") as archive:
            for name in names:
                archive.writestr(name, files[name])
    elif kind.endswith("gz"):
        with tarfile.open(tmp_path / kind, "w:gz") as archive:
            for name in names:
                archive.add(root / name, name)
    source = f"code:path={tmp_path / kind},suffixes=py,txt"
    want = "# file: a.py\na = 1\n\n# file: z/b.py\nb = 1\n\n# file: z/c.txt\nc\n"
    assert texts(source) == {kind: want}
    assert list(texts(source + ",depth=1")) == [kind, f"{kind}/z"]
    assert list(texts(source + ",depth=1,only=z")) == [f"{kind}/z"]


def test_a_page_becomes_its_text():
    page = "<html><head><title>x</title></head><p>a &lt; b</p><script>1</script><p>c"
    assert plain(page) == "a < b\n\nc\n"


def test_what_cannot_be_read_is_named_and_counted_or_fatal(tmp_path):
    path = tmp_path / "x"
    lines(path / "a.jsonl", {"text": "good"}, "{", {"other": 1}, {"text": " "}, "[1]")
    source = f"jsonl:path={path}"
    with pytest.raises(LclmError, match=r"a\.jsonl:2: not JSON.*'skip'"):
        open_store(source, BYTES, root=tmp_path / "s")
    assert not list_stores(tmp_path / "s") and not list((tmp_path / "s").iterdir())
    found = open_store(source, BYTES, root=tmp_path / "s", undecodable="skip").summary
    assert (found.documents, found.skipped) == (1, 4)
    assert [n.split(": ")[0] for n in found.named] == [
        f"a.jsonl:{i}" for i in (2, 3, 4, 5)
    ]
    (path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(LclmError, match=r"not UTF-8.*at byte 3"):
        open_store(f"folder:path={path}", BYTES, root=tmp_path / "s")
    with pytest.raises(LclmError, match="has no document"):
        open_store(
            f"folder:path={path}", BYTES, root=tmp_path / "s", undecodable="skip"
        )


def test_a_store_holds_the_tokens_of_the_documents(tmp_path, jsonl, monkeypatch):
    monkeypatch.setattr(store, "PIECE", 7)  # several records a document
    monkeypatch.setattr(store, "RECORDS_A_SHARD", 4)
    opened = open_store(jsonl, BYTES, root=tmp_path / "s")
    want = [[*text.encode(), 257] for text in texts(jsonl).values()]
    assert len(opened) == 6 and opened.summary.tokens == sum(map(len, want))
    assert [opened.id(i) for i in range(6)] == list(texts(jsonl))
    for doc, ids in enumerate(want):
        assert opened.lengths[doc] == len(ids)
        for start, count in ((0, len(ids)), (3, 9), (7, 7), (len(ids) - 1, 1)):
            tokens, mask = opened.read(doc, start, count)
            assert tokens.tolist() == ids[start : start + count]
            assert mask.tolist() == [1] * len(tokens)


def test_a_whole_store_is_used_again_and_any_change_makes_another(
    tmp_path, jsonl, monkeypatch
):
    root = tmp_path / "s"
    first = open_store(jsonl, BYTES, root=root)
    assert first.summary.dtype == "uint16"
    monkeypatch.setattr(store, "read_documents", None)  # nothing is read again
    assert open_store(jsonl, BYTES, root=root).path == first.path
    paths = {first.path, store_path(jsonl, Chat(), root=root)}
    paths.add(store_path(jsonl, BYTES, root=root, undecodable="skip"))
    paths.add(store_path(jsonl.replace("id=key", "field=key"), BYTES, root=root))
    lines(tmp_path / "a.jsonl", {"text": "changed"})
    paths.add(store_path(jsonl, BYTES, root=root))
    assert len(paths) == 5


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left")])
def test_an_interrupted_build_leaves_nothing(tmp_path, jsonl, error):
    def interrupt(summary):
        if summary.documents == 3:
            raise error

    root = tmp_path / "s"
    kind = LclmError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(kind, match="No space left" if kind is LclmError else None):
        open_store(jsonl, BYTES, root=root, observe=interrupt)
    assert list(root.iterdir()) == []
    # What a killed process leaves is not taken for a store either.
    (root / ".building-x" / "store").mkdir(parents=True)
    (root / ".building-x" / "store" / "summary.json").write_text("{}")
    assert list_stores(root) == {}
    assert len(open_store(jsonl, BYTES, root=root)) == 6
    assert store.remove_unfinished(root) == 1 and len(list_stores(root)) == 1


def test_a_long_text_has_the_ids_of_the_whole(monkeypatch):
    from lclm.data import tokens

    monkeypatch.setattr(tokens, "SLICE", 20)
    text = "one line\nand another\n\n  indented\n" * 9
    assert encode(BYTES, text) == list(text.encode())


def test_batches_come_from_stores_and_leave_out_what_is_held_out(tmp_path, jsonl):
    held = tmp_path / "held.jsonl"
    lines(held, {"text": "text 5 " * 6})
    spec = DataSpec(
        mixture=(Part(jsonl),),
        held_out=(f"jsonl:path={held}",),
        folder=str(tmp_path / "s"),
    )
    batch = next(open_batches(spec, BYTES, batch=8, length=16, seed=0))
    seen = bytes(batch["tokens"][batch["tokens"] < 256].astype(np.uint8))
    assert b"text 4" in seen and b"5" not in seen
    lines(held, {"text": "unknown"})
    with pytest.raises(LclmError, match="nothing would be held out"):
        open_batches(spec, BYTES, batch=8, length=16, seed=0)


def test_only_what_the_assistant_says_is_predicted(tmp_path):
    path = tmp_path / "c.jsonl"
    turns = [("system", "s"), ("user", "u"), ("assistant", "A"), ("user", "v")]
    messages = [{"role": r, "content": c} for r, c in [*turns, ("assistant", "BB")]]
    lines(path, {"messages": messages}, {"prompt": "p", "response": "R"})
    first, second = read_documents(f"chat:path={path}")
    tokens, mask = tokenise(first, Chat())
    assert (
        bytes(tokens.tolist())
        == Chat().chat(messages, add_generation_prompt=False).encode()
    )
    assert bytes(tokens[mask == 1].tolist()) == b"A</>BB</>"
    tokens, mask = tokenise(second, Chat())
    assert bytes(tokens[mask == 1].tolist()) == b"R</>"
    raw = list(read_documents(f"chat:path={path},raw=yes"))[1]
    tokens, mask = tokenise(raw, BYTES)
    assert (tokens.tolist(), mask.tolist()) == ([112, 82, 257], [0, 1, 1])
    with pytest.raises(LclmError, match="template"):
        tokenise(first, BYTES)
    spec = DataSpec(source=f"chat:path={path}", folder=str(tmp_path / "s"))
    batch = next(open_batches(spec, Chat(), batch=1, length=128, seed=0))
    counted = bytes(batch["targets"][batch["weights"] > 0].astype(np.uint8))
    assert sorted(counted) == sorted(b"A</>BB</>R</>")


def test_a_template_that_rewrites_what_was_said_is_refused(tmp_path):
    class Forgets(Chat):
        def chat(self, messages, *, add_generation_prompt=True):
            return super().chat(messages[-1:], add_generation_prompt=False)

    path = tmp_path / "c.jsonl"
    lines(path, {"prompt": "p", "response": "R"})
    (document,) = read_documents(f"chat:path={path}")
    with pytest.raises(LclmError, match="rewrites"):
        tokenise(document, Forgets())


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({}, "neither"),
        ({"messages": []}, "neither"),
        ({"messages": [{"content": "x"}]}, "no role"),
        ({"messages": [{"role": "user", "content": None}]}, "no text"),
        ({"messages": [{"role": "user", "content": "x"}]}, "nothing to learn"),
    ],
)
def test_a_conversation_without_an_answer_is_named(tmp_path, record, said):
    lines(tmp_path / "c.jsonl", record)
    (document,) = read_documents(f"chat:path={tmp_path}/c.jsonl")
    assert document.text is None and said in document.problem


def test_sources_are_checked_before_anything_is_read(tmp_path):
    for source, said in (
        ("jsonl:path=/nowhere", "/nowhere"),
        ("jsonl:", "path"),
        ("jsonll:path=x", "did you mean 'jsonl'"),
        (f"jsonl:path={tmp_path},fild=x", "did you mean 'field'"),
    ):
        with pytest.raises(LclmError, match=said):
            check(source)
    for name in DOCUMENTS:
        assert callable(DOCUMENTS[name])
    with pytest.raises(LclmError, match="not pinned"):
        texts("package:name=numpy")
    with pytest.raises(LclmError, match="not pinned"):
        texts("deb:name=vim-doc,version=1")


def test_a_store_that_is_shared_by_threads_gives_the_same(tmp_path, jsonl):
    from concurrent.futures import ThreadPoolExecutor

    opened = Store(open_store(jsonl, BYTES, root=tmp_path).path)
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda i: opened.read(i % 6, 2, 4)[0].tolist(), range(60))
        )
    assert found == found[:6] * 10


def test_single_texts_stay_in_memory(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("some text")
    spec = DataSpec(source=f"local:path={path}", folder=str(tmp_path / "s"))
    opened = pipeline.open_documents(spec, spec.source, BYTES)
    assert opened.read(0, 0, 99)[0].tolist() == [*b"some text", 257]
    assert not (tmp_path / "s").exists()


def test_questions_about_a_book_have_their_answers_in_the_passage(tmp_path):
    path = tmp_path / "book.txt"
    sentence = "The {} sheep of that wide green valley went slowly down to the river. "
    path.write_text("".join(sentence.format(i) for i in range(60)))
    source = f"book_questions:book=local:path={path},passage=500"
    found = list(read_documents(source))
    assert len(found) == 60 // 8 and found == list(read_documents(source))
    seen = set()
    for document in found:
        asked, answer = (m["content"] for m in document.text)
        passage, _, question = asked.rpartition("\n\n")
        assert answer in " ".join(passage.split()) and answer not in question
        seen.add(question.split()[0])
    assert seen == {"Finish", "Which"}
    assert len(list(read_documents(source + ",every=3"))) == 3
    with pytest.raises(LclmError, match="at least 200"):
        list(read_documents(f"book_questions:book=local:path={path},passage=10"))
    with pytest.raises(LclmError, match="/nowhere"):
        check("book_questions:book=local:path=/nowhere")
