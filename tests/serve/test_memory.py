"""What a text adds to the whole process, measured as the benchmark measures it."""

import argparse
import json

import jax
import pytest

from benchmarks import caches
from lclm.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, RopeSpec, Run
from lclm.language_model import LanguageModel
from lclm.models.decoder import init_params


@pytest.mark.slow
def test_a_long_text_adds_to_the_process_only_what_its_policy_keeps(
    tmp_path, monkeypatch
):
    spec = AttentionSpec(8, 8, 64, RopeSpec(context=64))  # 4 KiB a token
    run = Run((LayerSpec(spec, MlpSpec(64)),), 1)
    config = ModelConfig("llama", 97, 64, (run,), 64)
    model, out = tmp_path / "model", tmp_path / "memory.json"
    LanguageModel(config, init_params(config, jax.random.key(0))).save(model)
    args = argparse.Namespace(
        length=16384, chunk=512, budget=[2048], threads=2, methods=["full", "snapkv"]
    )

    def measure():
        facts = {"length": args.length, "chunk": args.chunk}
        caches.memory(args, model, caches.Table(out, facts))

    measure()
    full, snapkv = json.loads(out.read_text())["rows"]
    assert snapkv["cache_bytes"] < full["cache_bytes"] / 7
    assert snapkv["share"] <= 0.3
    assert full["share"] > 0.7  # what grows with the text is seen
    # What was measured is not measured again, at these settings.
    monkeypatch.setattr(caches, "share", lambda *_: {"share": None})
    measure()
    assert json.loads(out.read_text())["rows"] == [full, snapkv]
    args.chunk = 256
    measure()
    assert [row["share"] for row in json.loads(out.read_text())["rows"]] == [None] * 2
