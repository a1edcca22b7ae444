"""Laws of LongBench-mini: the reader takes it, every answer is found by its rule."""

import json
import re

import eval_files
import pytest
from eval_doubles import Letters

from lclm.cli.main import main
from lclm.data import longbench_mini, qa
from lclm.data.longbench_mini import write
from lclm.errors import LclmError
from lclm.evals.longbench import LongBench

PARTS = (("core", "sets"), ("sets", "core"), ("logic", "core"), ("plot", "numpy"))
CODE = {
    f"sympy/{name}.py": "\n".join(
        [f"from .{other} import part", *(f"value_{i} = {name}({i}, {i + 1})"
                                         for i in range(60))]
    )
    + "\n"
    for name, other in PARTS
}  # fmt: skip


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    def members(name):
        found = eval_files.questions(name)
        if name.endswith("hotpotqa.json"):
            for question in found:
                for title, sentences in question["context"]:
                    more = f" {title} is told of in many words." * 6
                    sentences[1:] = [more, " Few know it."]
        return found

    files = [(path, text.encode()) for path, text in CODE.items()]
    monkeypatch.setattr(qa, "_member", members)
    monkeypatch.setattr(longbench_mini, "fetch_wheel", lambda wheel: wheel)
    monkeypatch.setattr(longbench_mini, "members", lambda wheel: files)


def lines(folder, name):
    text = (folder / "data" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, examples=3, words=400)
    return tmp_path


def test_the_reader_takes_it_and_the_same_seed_gives_the_same_files(folder, tmp_path):
    job = LongBench(str(folder))
    assert job.title == "LongBench-mini"
    assert sum(item.queries for item in job.items()) == 3 * 7
    for example in job.examples(Letters()):
        for query in example.queries:
            assert job.grade(query, query.perfect) == 1
    held = {p.name: p.read_bytes() for p in (folder / "data").iterdir()}
    write(tmp_path / "again", examples=3, words=400)
    again = {p.name: p.read_bytes() for p in (tmp_path / "again" / "data").iterdir()}
    assert held == again
    write(tmp_path / "other", examples=3, words=400, seed=1)
    other = {p.name: p.read_bytes() for p in (tmp_path / "other" / "data").iterdir()}
    assert held != other


def test_answers_stand_in_their_contexts(folder):
    for name in ("hotpotqa", "multifieldqa_en"):
        for line in lines(folder, name):
            assert line["answers"][0] in line["context"]
            assert line["length"] == len(line["context"].split())
            assert line["length"] <= 420 or name == "hotpotqa"
    write(folder, examples=2, words=2000, datasets=("hotpotqa",))
    short, long = (line["length"] for line in lines(folder, "hotpotqa"))
    assert short < 1000 < long <= 2100


def test_labelled_questions_fill_a_context_without_the_one_that_is_asked(tmp_path):
    titles = {q[1]: a.title for a in qa.squad() for q in a.questions}
    write(tmp_path, examples=3, words=200, datasets=("trec",))
    for line in lines(tmp_path, "trec"):
        shots = dict(re.findall(r"Question: (.*)\nType: (.*)", line["context"]))
        assert 0 < line["length"] <= 200 and titles.items() > shots.items()
        question = line["input"].removeprefix("Question: ").removesuffix("\nType:")
        assert question not in shots and line["answers"] == [titles[question]]
        assert line["all_classes"] == ["Homes", "Houses"]


def test_an_abstract_is_taken_out_of_its_paragraph(folder):
    texts = {text for hop in qa.hotpotqa() for _, text in hop.parts}
    for line in lines(folder, "passage_retrieval_en"):
        parts = re.split(r"\n\n(?=Paragraph )", line["context"])
        (label,) = line["answers"]
        place = int(label.split()[1])
        assert parts[place - 1].startswith(f"{label}: ")
        assert line["input"] not in line["context"]
        whole = f"{line['input']} {parts[place - 1].removeprefix(f'{label}: ')}"
        assert whole in texts


def test_a_count_is_of_distinct_paragraphs(folder):
    for line in lines(folder, "passage_count"):
        parts = [p.split(": ", 1)[1] for p in line["context"].split("\n\n")]
        assert line["answers"] == [str(len(set(parts)))] and len(set(parts)) < len(
            parts
        )


def test_the_next_line_follows_in_the_file(folder):
    for name in ("lcc", "repobench-p"):
        for line in lines(folder, name):
            path = line["_id"].split(":")[0]
            shown = (line["input"] or line["context"]).removeprefix(f"# Path: {path}\n")
            assert f"{shown}{line['answers'][0]}\n" in CODE[path]
            if name == "repobench-p":
                assert path != "sympy/plot.py"
                told = re.findall("# Path: (.*)", line["context"])
                assert told and path not in told


def test_meetings_join_where_their_file_is_given(tmp_path, capsys):
    meeting = {
        "meeting_transcripts": [{"speaker": "A", "content": "We start."}],
        "general_query_list": [{"query": "Sum up.", "answer": "They started."}],
        "specific_query_list": [{"query": "Who?", "answer": "A."}],
    }
    file = tmp_path / "qmsum.jsonl"
    file.write_text(json.dumps(meeting) + "\n")
    made = write(tmp_path, examples=2, words=400, qmsum=str(file), datasets=("qmsum",))
    assert made == {"qmsum": 2}
    assert {x["input"] for x in lines(tmp_path, "qmsum")} == {"Sum up.", "Who?"}
    file.write_text('{"a": 1}\n')
    with pytest.raises(LclmError, match=r"line 1 is no meeting of QMSum"):
        write(tmp_path, qmsum=str(file))
    with pytest.raises(LclmError, match="no QMSum file 'nowhere'"):
        write(tmp_path, qmsum="nowhere")
    with pytest.raises(LclmError, match="words is 10"):
        write(tmp_path, words=10)
    with pytest.raises(LclmError, match="did you mean 'lcc'"):
        write(tmp_path, datasets=("lc",))


def test_the_command_writes_a_folder_and_says_how_to_use_it(tmp_path, capsys):
    folder = tmp_path / "mini"
    told = [f"--folder={folder}", "--examples=1", "--words=300"]
    assert main(["data", "longbench_mini", *told]) == 0
    assert "lclm eval longbench MODEL" in capsys.readouterr().out
    assert len(list((folder / "data").iterdir())) == 7
    assert "not LongBench's own" in (folder / "README.md").read_text()
