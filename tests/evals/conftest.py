import pytest
from eval_doubles import PROSE, Bpe, Scripted


@pytest.fixture(scope="session")
def tokenizer():
    return Bpe()


@pytest.fixture
def lm(tokenizer):
    return Scripted(tokenizer)


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "prose, with commas.txt"
    path.write_text(PROSE, encoding="utf-8")
    return f"local:path={path}"
