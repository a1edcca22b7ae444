"""Laws of `lclm run`: a typo is an error, a report is whole, a rerun measures less."""

import io
import json
import re
from pathlib import Path

import pytest
from eval_doubles import Scripted
from rich.console import Console

from lclm.cli.config_file import read_config
from lclm.cli.job import read_job, to_job
from lclm.cli.main import main
from lclm.cli.run import machine, run
from lclm.errors import LclmError
from lclm.train.config import train_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").glob("*/*.py"))
EVALS = [p for p in CONFIGS if "eval=" in p.read_text()]

CONFIG = """
import ml_collections

def get_config(length=300, source={source!r}, rate=0.5, name="small"):
    c = ml_collections.ConfigDict()
    c.name, c.model, c.title = name, "scripted", "A <small> run"
    c.stages = [
        dict(eval="perplexity", source=source, length=length, splits=[100], bucket=50,
             readings=[dict(cache="full", length=200), dict(cache="window:window=8")]),
        dict(eval="passkey", title="Keys", lengths=[300, 400], depths=[rate]),
    ]
    return c
"""


@pytest.fixture
def config(tmp_path, source):
    path = tmp_path / "small.py"
    path.write_text(CONFIG.format(source=source))
    return path


def go(config, tmp_path, lm, **options):
    screen = Console(file=io.StringIO(), width=120)
    report = run(
        str(config),
        workdir=tmp_path / "run",
        load=lambda *a, **k: lm,
        console=screen,
        **options,
    )
    return report, screen.file.getvalue()


def test_a_run_writes_records_figures_and_one_page_that_loads_nothing(
    config, tmp_path, lm
):
    report, screen = go(config, tmp_path, lm)
    names = sorted(p.name for p in report.parent.iterdir())
    assert names == [
        "cost.csv",
        "loss_by_position.csv",
        "loss_by_position.png",
        "metrics.jsonl",
        "passkey.csv",
        "report.html",
        "run.json",
    ]
    page = report.read_text()
    assert "A &lt;small&gt; run" in page and "<small>" not in page
    assert page.count('<figure class="chart">') == 1
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "lclm run --config=" in page and "window:window=8" in page
    assert "Perplexity by cache" in screen and "Passkey retrieval" in screen
    lines = (report.parent / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert all(json.loads(line)["scope"].startswith("scripted/") for line in lines)


def test_a_second_run_measures_nothing_and_gives_the_same_tables(config, tmp_path, lm):
    _, first = go(config, tmp_path, lm)
    second_lm = Scripted(lm.tokenizer)
    _, second = go(config, tmp_path, second_lm)
    assert second_lm.calls == []
    rows = [
        [line for line in screen.splitlines() if re.match(r"│ \w", line)]
        for screen in (first, second)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 2 + 1 + 2


def test_a_changed_setting_is_measured_anew(config, tmp_path, lm):
    go(config, tmp_path, lm)
    again = Scripted(lm.tokenizer)
    go(f"{config}:length=320", tmp_path, again)
    assert [c[0] for c in again.calls] == ["nll", "nll"]


def test_an_interrupt_keeps_records_and_says_how_to_go_on(config, tmp_path, lm):
    class Stops(Scripted):
        def generate(self, *args, **options):
            raise KeyboardInterrupt

    screen = Console(file=io.StringIO(), width=120)
    with pytest.raises(KeyboardInterrupt):
        run(
            str(config),
            workdir=tmp_path / "run",
            load=lambda *a, **k: Stops(lm.tokenizer),
            console=screen,
        )
    assert "same command goes on" in screen.file.getvalue()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert "Perplexity" in (tmp_path / "run" / "report.html").read_text()


def test_models_side_by_side_share_tables_and_keep_their_own_records(
    config, tmp_path, lm
):
    both = tmp_path / "both.py"
    both.write_text(
        config.read_text().replace(
            "c.stages = [",
            "c.models = [dict(name='plain'), dict(name='PI', rope='linear:factor=4')]"
            "\n    c.stages = [",
        )
    )
    asked = []

    def load(source, **held):
        asked.append((source, held))
        return Scripted(lm.tokenizer)

    for _ in range(2):
        screen = Console(file=io.StringIO(), width=140)
        report = run(
            str(both), workdir=tmp_path / "run", load=load, console=screen
        ).read_text()
    pi = {"rope": "linear:factor=4"}
    assert asked[:3] == [("scripted", {}), ("scripted", pi), ("scripted", {})]
    rows = re.findall(r"^│ (\w.*?) +│", screen.file.getvalue(), re.M)
    assert rows[:4] == [
        "plain, full",
        "plain, window:window=8",
        "PI, full",
        "PI, window:window=8",
    ]
    assert rows[4:6] == ["plain", "PI"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 4
    assert len({json.loads(line)["scope"] for line in lines}) == 2 * 2
    assert "linear:factor=4" in report


def test_the_command_runs_a_job_and_a_mistake_exits_with_two(
    config, tmp_path, lm, monkeypatch, capsys
):
    monkeypatch.setattr("lclm.cli.options.load_model", lambda *a, **k: lm)
    folder = tmp_path / "chosen"
    assert main(["run", f"--config={config}", f"--workdir={folder}"]) == 0
    assert (folder / "report.html").is_file()
    assert main(["run", f"--config={config}:lenght=5"]) == 2
    assert "did you mean 'length'" in capsys.readouterr().err


def base(**more):
    return {"name": "n", "model": "m", "stages": [{"eval": "passkey"}], **more}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (base(modell="x"), "no field 'modell'.*did you mean 'model'"),
        (base(name="a/b"), "'a/b' cannot name a folder"),
        (base(name=".."), "cannot name a folder"),
        (base(name=3), "'name' is 3; expected a string"),
        (base(stages=[]), "'stages' is missing or empty"),
        (base(model=""), "'model' is missing or empty"),
        (base(models={"a": {}}), "'models' is .*; expected a list"),
        (base(models=["a"]), r"models\[0\] is 'a'; expected a table with a 'name'"),
        (base(models=[{"name": "a", "roep": "x"}]), "did you mean 'rope'"),
        (base(models=[{"name": "a", "rope": "yran:factor=4"}]), "mean 'yarn'"),
        (base(models=[{"name": "a"}] * 2), "two of 'models' have the name 'a'"),
        (base(rope="yarn:factor=x"), "factor='x' is not a number"),
        (base(adapter="nowhere"), "adapter 'nowhere': no adapter_model.safetensors"),
        (base(stages="passkey"), "expected a list"),
        (base(stages=[{"lengths": [5]}]), r"stages\[0\].*'eval', one of perplexity"),
        (base(stages=[{"eval": "passky"}]), "did you mean 'passkey'"),
        (
            base(stages=[{"eval": "passkey", "length": [5]}]),
            "no option 'length'.*did you mean 'lengths'",
        ),
        (base(stages=[{"eval": "passkey", "lengths": ["x"]}]), "lengths.* is 'x'"),
        (
            base(stages=[{"eval": "perplexity", "readings": [{"cach": "full"}]}]),
            "no option 'cach'.*did you mean 'cache'",
        ),
    ],
)
def test_a_typo_in_a_config_is_an_error_that_suggests_the_name(data, words):
    with pytest.raises(LclmError, match=words):
        to_job(data)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (":lenght=3", "no option 'lenght'.*did you mean 'length'"),
        (":length=long", "length is 'long'; expected int, for instance 300"),
        (":length=2.5", "expected int"),
        (":rate=true", "expected float"),
        (":length", "'length' is not KEY=VALUE"),
    ],
)
def test_a_bad_option_is_an_error_that_names_the_allowed(config, options, words):
    with pytest.raises(LclmError, match=words):
        read_job(f"{config}{options}")


def test_options_are_typed_as_their_defaults_are(config):
    job = read_job(f"{config}:length=250,rate=1,name=other")
    assert job.name == "other"
    assert job.stages[0].evaluation.length == 250
    assert job.stages[1].evaluation.depths == (1.0,)


def test_a_config_that_is_not_one_is_an_error(tmp_path, config):
    with pytest.raises(LclmError, match=r"no config file .*small\.py"):
        read_job(str(tmp_path / "smal.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(LclmError, match=r"no function get_config"):
        read_job(str(tmp_path / "empty.py"))
    (tmp_path / "broken.py").write_text("def")
    with pytest.raises(LclmError, match="cannot be read"):
        read_job(str(tmp_path / "broken.py"))


def test_a_file_for_a_workdir_is_refused_before_the_model_loads(config, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("")
    with pytest.raises(LclmError, match="is a file: name a folder"):
        run(str(config), workdir=taken, load=lambda *a: pytest.fail("loaded"))


@pytest.mark.parametrize("path", EVALS, ids=lambda p: p.stem)
def test_every_config_is_a_job_and_opens_with_its_command(path):
    job = read_job(str(path))
    assert job.name == path.stem
    opening = path.read_text().split('"""')[1]
    assert f"lclm run --config=configs/{path.name}" in opening
    assert re.search(r"About \d+ minutes|minutes on 2 CPU", opening)
    assert "Expected:" in opening
    imports = re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.M)
    assert imports == ["ml_collections"]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_experiment_can_be_run_and_opens_with_its_command(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = path.relative_to(ROOT)
    text = path.read_text()
    opening = text.split('"""')[1]
    assert (path.parent / "README.md").is_file()
    if "def get_config(" not in text:
        assert f"python {shown}" in opening
        return
    command = "run" if "eval=" in text else "train"
    if command == "run":
        read_job(str(path))
    else:
        train_config(read_config(str(path)))
    assert f"lclm {command} --config={shown}" in opening
    assert re.findall(r"^(?:import|from) (\w+)", text, re.M) == ["ml_collections"]


def test_the_machine_is_described_in_words():
    facts = machine()
    assert all(isinstance(v, str) and v for v in facts.values())
    assert {"date", "processor", "devices", "jax", "lclm"} <= set(facts)
