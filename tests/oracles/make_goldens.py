"""Write (or with --check compare) the reference outputs that the tests hold us to.

Run by a Python 3.11 environment with requirements-oracles.txt, never by the
package: PyTorch and `transformers` are the oracle. Tiny models get weights far from
their tame initial values, so that a lost term shows (reference: architectures.md 7).

    python tests/oracles/make_goldens.py [--check] [names ...]
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH = 40
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def rope(kind: str, theta: float = 10000.0, **values) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **values}}


CASES = {
    "llama": LlamaConfig(**TINY),
    "llama_tied": LlamaConfig(**TINY | {"tie_word_embeddings": True}),
    "llama_head16": LlamaConfig(**TINY, head_dim=16),
    "llama_bias": LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
    "llama_rope_llama3": LlamaConfig(
        **TINY,
        **rope(
            "llama3",
            5e5,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama_rope_linear": LlamaConfig(**TINY, **rope("linear", factor=4.0)),
    "llama_rope_yarn": LlamaConfig(
        **TINY, **rope("yarn", factor=4.0, original_max_position_embeddings=16)
    ),
    "mistral": MistralConfig(**TINY, sliding_window=5),
    "qwen2": Qwen2Config(
        **TINY, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": Qwen3Config(
        **TINY | {"tie_word_embeddings": True},
        head_dim=16,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
    "gemma3": Gemma3TextConfig(
        **TINY | {"num_hidden_layers": 3, "tie_word_embeddings": True},
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        final_logit_softcapping=5.0,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            "full_attention": {
                "rope_type": "linear",
                "rope_theta": 1e5,
                "factor": 2.0,
            },
        },
    ),
}
TEXTS = (
    "It is a truth universally acknowledged, that a single man in possession of a "
    "good fortune, must be in want of a wife. However little known the feelings or "
    "views of such a man may be on his first entering a neighbourhood, this truth is "
    "so well fixed in the minds of the surrounding families, that he is considered.",
    "In 1984, 12345 + 67890 = 80235;\tcost: $3.50\n\n  indented   code()  # done",
    "naïve café — “quotes” … 日本語 🎉 Ελληνικά",
    "<|im_start|>user\nHello!<|im_end|>\n",
)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Matrices N(0, 0.6 / sqrt(fan in)), norms 1 + 0.2 N (Gemma 0.2 N), bias 0.3 N."""
    generator = torch.Generator().manual_seed(seed)
    gemma = "Gemma" in type(model).__name__
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("bias"):
                noise = 0.3 * noise
            elif value.ndim == 1:
                noise = 0.2 * noise + (0.0 if gemma else 1.0)
            else:
                noise = 0.6 * noise / value.shape[-1] ** 0.5
            value.copy_(noise)


def write_tiny(name: str, folder: Path) -> None:
    """One random model as save_pretrained writes it, with tokens and their logits."""
    seed = 1000 + sorted(CASES).index(name)
    config = CASES[name]
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens = np.random.default_rng(seed).integers(0, 64, (2, LENGTH))
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)).logits.float().numpy()
    np.savez(folder / "golden.npz", tokens=tokens.astype(np.int32), logits=logits)


def write_smollm2(file: Path, folder: Path) -> None:
    """SmolLM2 through transformers' own GGUF reader: token ids, losses, some logits."""
    where = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, **where, dtype=torch.float32
    ).eval()
    ids = [tokenizer(t, add_special_tokens=False).input_ids for t in TEXTS]
    tokens = np.array(ids[0][:64], np.int32)[None]
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens).long()).logits[0].float()
    nll = torch.nn.functional.cross_entropy(
        logits[:-1], torch.from_numpy(tokens[0, 1:]).long(), reduction="none"
    )
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    np.savez(
        folder / "golden.npz",
        tokens=tokens,
        nll=nll.numpy(),
        logits_every_768=logits[:, ::768].numpy(),
        last_logits_every_16=logits[-1, ::16].numpy(),
        texts=np.array(TEXTS),
        chat=np.array(chat),
        **{f"ids_{i}": np.array(row, np.int32) for i, row in enumerate(ids)},
    )


def differences(made: Path, kept: Path) -> list[str]:
    """Every file of `made` that `kept` does not hold: arrays to 1e-5, bytes exactly."""
    found = []
    for path in sorted(made.iterdir()):
        twin = kept / path.name
        if not twin.is_file():
            found.append(f"{twin} is missing")
        elif path.suffix == ".npz":
            with np.load(path) as new, np.load(twin) as old:
                found += [f"{twin}: {k}" for k in new.files if not same(new, old, k)]
        elif path.suffix == ".safetensors" and path.read_bytes() != twin.read_bytes():
            found.append(f"{twin} differs")
    return found


def same(new, old, key: str) -> bool:
    if key not in old.files or new[key].shape != old[key].shape:
        return False
    if new[key].dtype.kind != "f":
        return bool((new[key] == old[key]).all())
    limit = 1e-5 * np.abs(old[key]).max()
    return bool(np.abs(new[key] - old[key]).max() <= limit)


def cached_smollm2() -> Path:
    """Where `lclm pull smollm2-135m` keeps the file."""
    chosen = os.environ.get("LCLM_CACHE")
    base = Path(chosen) if chosen else Path.home() / ".cache" / "lclm"
    return base / "models" / SMOLLM2


def make(
    about: str, names: Iterable[str], write: Callable[[str, Path], bool | None]
) -> int:
    """The command line of an oracle: write the goldens named, or compare with --check.

    `write` puts the files of one golden into a folder and is False where it cannot.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("names", nargs="*", default=[*names])
    args = parser.parse_args()
    torch.set_num_threads(2)
    problems = []
    for name in args.names:
        with tempfile.TemporaryDirectory() as work:
            if write(name, Path(work)) is False:
                continue
            if args.check:
                problems += differences(Path(work), GOLDEN / name)
            else:
                shutil.rmtree(GOLDEN / name, ignore_errors=True)
                shutil.copytree(work, GOLDEN / name)
        print(f"{name}: {'compared' if args.check else 'written'}")
    print("\n".join(problems), f"transformers {transformers.__version__}", sep="\n")
    return 1 if problems else 0


def write(name: str, folder: Path) -> bool:
    """A tiny model's golden, or SmolLM2's where its file is at hand."""
    if name != "smollm2":
        write_tiny(name, folder)
        return True
    file = cached_smollm2()
    if not file.is_file():
        print(f"smollm2: skipped, no {file} (lclm pull smollm2-135m)")
        return False
    write_smollm2(file.resolve(), folder)
    return True


if __name__ == "__main__":
    sys.exit(make(__doc__, [*CASES, "smollm2"], write))
