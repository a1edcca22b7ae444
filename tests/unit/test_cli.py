"""Laws of the command line: help is instant, a mistake is one line and exit code 2."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

import lclm
from lclm.cli import options
from lclm.cli.eval import settings
from lclm.cli.main import COMMANDS, main
from lclm.cli.plan import parameters
from lclm.errors import LclmError


class Letters:
    """A tokenizer of one byte a token."""

    def encode(self, text, bos=False):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode()

    def chat(self, messages, add_generation_prompt=True):
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<answer>"


class Stream:
    def __init__(self, text, stats):
        self.text, self.result = text, SimpleNamespace(text=text, stats=stats)

    def __iter__(self):
        return iter(self.text)


class Echo:
    """Answers with the length of its prompt and keeps what it was asked."""

    def __init__(self):
        self.tokenizer, self.asked = Letters(), []
        self.config = SimpleNamespace(context=64)

    def nll(self, tokens, *, cache="full", chunk=512, progress=None):
        raise NotImplementedError

    def encode(self, text):
        return self.tokenizer.encode(text)

    def resumes(self, cache):
        return False

    def cache_bytes(self, cache, length):
        return 0

    def prefill(self, text, *, cache="full", room=0):
        raise NotImplementedError

    def generate(self, prompt, *, cache, chunk, stream, **sampling):
        self.asked.append((prompt, cache, sampling))
        stats = SimpleNamespace(
            bytes=2048,
            prompt_tokens=len(prompt),
            new_tokens=2,
            prefill_seconds=1.0,
            decode_seconds=0.5,
            tokens_per_second=4.0,
        )
        return Stream(f"#{len(prompt)}", stats)


@pytest.fixture
def echo(monkeypatch):
    lm = Echo()
    monkeypatch.setitem(vars(lclm), "load", lambda *_, **__: lm)
    return lm


def in_new_process(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_names_every_command_without_importing_jax():
    code = "import sys; from lclm.cli.main import main; status = main(['--help']); "
    code += "sys.exit(status or 'jax' in sys.modules or 'numpy' in sys.modules)"
    done = in_new_process("-c", code)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: lclm {name}")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["generat", "x"], "did you mean 'generate'"),
        (["generate"], "the following arguments are required: model"),
        (["generate", "x", "-p", "a", "--chunk", "0"], "'0' is not a whole number"),
        (["generate", "x", "-p", "a", "--dtype", "fp8"], "choose from"),
        (["generate", "x", "-p", ""], "the prompt is empty"),
        (["generate", "x", "-f", "/no/such/file"], "No such file"),
        (["run"], "the following arguments are required: --config"),
        (["run", "--config=no_such.py"], "no config file 'no_such.py'"),
        (["plan", "no_such_model"], "no model at 'no_such_model'"),
        (["pull", "smollm"], "did you mean 'smollm2-135m'"),
        (["list", "cache"], "choose from"),
        (["eval", "passkee", "x"], "did you mean 'passkey'"),
        (["eval", "passkey", "x", "trials"], "'trials' is not key=value"),
        (["eval", "passkey", "x", "trails=3"], "did you mean 'trials'"),
        (["eval", "passkey", "x", "--dtype", "float32", "trails=3"], "did you mean"),
        (["bench", "x", "--lengths", "2q"], "'2q' is not a whole number"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, text, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert text in err and err.startswith("lclm: ") and err.count("\n") == 1
    assert out == ""


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setitem(vars(lclm), "load", broken)
    with pytest.raises(RuntimeError):
        main(["generate", "x", "-p", "a"])


def test_an_interrupt_exits_with_130(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setitem(vars(lclm), "load", interrupted)
    assert main(["generate", "x", "-p", "a"]) == 130
    assert capsys.readouterr().err == "lclm: interrupted\n"


def test_generate_streams_text_and_measures_on_stderr(echo, capsys):
    argv = ["generate", "m", "-p", "abc", "--cache", "window:window=4", "-n", "7"]
    assert main([*argv, "--stop", "x", "--stop", "y"]) == 0
    out, err = capsys.readouterr()
    assert out == "#3\n" and "cache 2.0 KiB" in err and "4.0 tokens/s" in err
    prompt, cache, sampling = echo.asked[0]
    assert (prompt, cache) == ("abc", "window:window=4")
    assert sampling["max_new_tokens"] == 7 and sampling["stop"] == ["x", "y"]


def test_a_file_and_a_question_make_one_prompt(echo, tmp_path, capsys):
    (tmp_path / "book").write_text("a book")
    assert main(["generate", "m", "-f", str(tmp_path / "book"), "--ask", "?"]) == 0
    assert echo.asked[0][0] == "a book?"


def test_chat_asks_line_by_line_in_one_conversation(echo, monkeypatch, capsys):
    made = []

    class Talk:
        def __init__(self, lm, cache, **options):
            made.append((lm, cache, options))

        def ask(self, line, **sampling):
            made.append(line)
            return Stream(line.upper(), None)

    monkeypatch.setattr("lclm.conversation.Conversation", Talk)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nmore\n"))
    assert main(["chat", "m", "--system", "be brief"]) == 0
    assert made[0][1] is None and made[0][2]["system"] == "be brief"
    assert made[1:] == ["hello", "more"]
    assert capsys.readouterr().out == "HELLO\nMORE\n"


def test_a_text_is_read_once_kept_and_asked_later(echo, tmp_path, capsys):
    events = []

    class Read:
        stats = echo.generate("", cache="", chunk=0, stream=True).result.stats

        def save(self, file):
            events.append(("save", file))

        def generate(self, question, **options):
            events.append(("ask", question))
            return Stream("yes", self.stats)

    echo.prefill = lambda text, cache, chunk: events.append(("read", text)) or Read()
    echo.load_context = lambda file: events.append(("load", file)) or Read()
    (tmp_path / "book").write_text("a book")
    command = ["generate", "m", "-f", str(tmp_path / "book"), "--save-cache", "kept"]
    assert main(command) == 0
    assert main([*command, "--ask", "?"]) == 0
    assert main(["generate", "m", "--load-cache", "kept", "--ask", "?"]) == 0
    read, save, ask = ("read", "a book"), ("save", "kept"), ("ask", "?")
    assert events == [read, save, read, save, ask, ("load", "kept"), ask]
    assert capsys.readouterr().out == "yes\nyes\n"
    assert main(["generate", "m", "-p", "a", "--load-cache", "kept"]) == 2


def test_convert_writes_whole_folders_only(monkeypatch, tmp_path, capsys):
    from lclm import hub

    def half_way(folder, bundle):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "load", lambda *_, **__: None, raising=False)
    monkeypatch.setattr(hub, "save_hf", half_way, raising=False)
    monkeypatch.setattr(hub, "save_orbax", half_way, raising=False)
    assert main(["convert", "m", str(tmp_path / "out")]) == 130
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    assert main(["convert", "m", str(tmp_path / "full")]) == 2
    assert "already there" in capsys.readouterr().err
    assert (tmp_path / "full" / "a").read_text() == "mine"


def test_list_prints_one_table_or_all(capsys):
    assert main(["list", "evals"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("evals: ") and "passkey" in out and "caches" not in out


def test_settings_are_json_under_dotted_keys():
    pairs = ["trials=3", "lengths=[512]", "a.b=x", "a.c=1.5", "cache=full"]
    expected = {"trials": 3, "lengths": [512], "a": {"b": "x", "c": 1.5}}
    assert settings(pairs) == expected | {"cache": "full"}
    with pytest.raises(LclmError, match="a was already given"):
        settings(["a=1", "a.b=2"])


def test_parameters_are_counted_from_the_description_alone():
    from lclm.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, Run

    layer = LayerSpec(AttentionSpec(heads=4, kv_heads=2, head_dim=8), MlpSpec(64))
    config = ModelConfig("llama", 100, 16, (Run((layer,), 3),), context=32)
    attention = 16 * (32 + 16 + 16) + 32 * 16
    assert parameters(config) == 1600 + 3 * (attention + 3 * 16 * 64 + 32) + 16


def test_lengths_read_k_and_m():
    assert options.lengths("512,2k,1M") == [512, 2048, 1024**2]


def test_eval_keeps_records_and_resumes(echo, monkeypatch, tmp_path, capsys):
    echo.generate = lambda *_, **__: SimpleNamespace(text=" 1 ")
    argv = ["eval", "passkey", "m", "lengths=[1200]", "depths=[0.5]", "trials=2"]
    argv += ["--out", str(tmp_path)]
    assert main(argv) == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["length"] == 1200

    def again(*_, **__):
        raise AssertionError("a finished record was measured again")

    echo.generate = again
    assert main(argv) == 0
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines


def test_a_plan_of_a_preset_names_weights_cache_and_state(capsys):
    assert main(["plan", "--model", "llama-2-7b", "--context", "2m"]) == 0
    text = capsys.readouterr().out
    assert "6,738,415,616 parameters, bfloat16: 12.6 GiB" in text
    assert "1.0 TiB" in text and "recurrent state at any length: 0 B" in text
    assert main(["plan", "mamba-130m", "--context", "256k"]) == 0
    text = capsys.readouterr().out
    assert "0 B" in text and "recurrent state at any length: 2" in text
