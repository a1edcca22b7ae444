"""`lclm data`: what a user sees of documents, tokens and rows."""

import json

import pytest

from lclm.cli.config_file import read_config
from lclm.cli.main import main
from lclm.errors import LclmError


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"text {i} " * (i + 1)}) for i in range(4)]
    path.write_text("\n".join([*lines, "{broken"]))

    def call(command: str, *words: str, status: int = 0) -> str:
        given = ["data", command, f"--folder={tmp_path / 's'}", *words]
        assert main(given) == status
        told = capsys.readouterr()
        return told.out if status == 0 else told.err

    call.source = f"--source=jsonl:path={path}"
    return call


def test_build_list_show_and_stats_tell_of_the_same_tokens(run):
    chosen = (run.source, "--tokenizer=bytes", "--skip")
    told = run("build", *chosen)
    assert "4 documents  74 tokens" in told and "skipped a.jsonl:5: not JSON" in told
    assert "74" in run("list") and "jsonl:path" in run("list", "--clean")
    told = run("stats", *chosen, "--length=16")
    assert "100.0%" in told and "rows of 16 tokens, best_fit" in told
    told = run("show", *chosen, "--length=96", "--rows=1")
    assert "document 4:" in told and "text 3 text 3" in told and "padding" in told


def test_a_config_names_the_data_and_the_tokenizer(run, tmp_path):
    source = run.source.removeprefix("--source=")
    config = tmp_path / "c.py"
    config.write_text(
        "def get_config(length=32):\n"
        "    return dict(model=dict(source='m', tokenizer='bytes'), length=length,\n"
        f"        steps=3, batch=2, data=dict(source={source!r}, undecodable='skip'))"
    )
    told = run("stats", f"--config={config}:length=16")
    assert "rows of 16 tokens" in told and "epochs" in told


def test_a_config_may_take_the_data_of_another(tmp_path):
    import ml_collections

    (tmp_path / "mix.py").write_text(
        "import ml_collections\n"
        "def get_config(length=1):\n"
        "    return ml_collections.ConfigDict(dict(data=dict(lengths=[length])))"
    )
    (tmp_path / "run.py").write_text(
        "import ml_collections\n"
        "def get_config():\n"
        f"    data = {str(tmp_path / 'mix.py') + ':length=7'!r}\n"
        "    return ml_collections.ConfigDict(dict(name='x', data=data))"
    )
    config = read_config(str(tmp_path / "run.py"))
    assert config == {"name": "x", "data": {"lengths": [7]}}
    assert type(config["data"]) is dict
    (tmp_path / "mix.py").write_text("def get_config(length=1):\n    return dict()")
    with pytest.raises(LclmError, match="without `data`"):
        read_config(str(tmp_path / "run.py"))
    assert isinstance(read_config("configs/smoke.py"), ml_collections.ConfigDict)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "either --config"),
        (("--source=kjv",), "--tokenizer=bytes"),
        (("--source=kjw", "--tokenizer=bytes"), "did you mean 'kjv'"),
        (("--source=kjv", "--tokenizer=/nowhere"), "no model at"),
    ],
)
def test_mistakes_are_one_line(run, words, said):
    assert said in run("build", *words, status=2)


def test_an_undecodable_document_is_fatal_unless_skipped(run):
    told = run("build", run.source, "--tokenizer=bytes", status=2)
    assert "a.jsonl:5" in told and "skip" in told and told.count("\n") == 1
