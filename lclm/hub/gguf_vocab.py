"""The tokenizer inside a GGUF file, rebuilt with the `tokenizers` package."""

from collections.abc import Callable

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from lclm.errors import LclmError, unknown
from lclm.hub.gguf_file import GgufFile
from lclm.hub.tokenizer import Specials, Tokenizer

CONTROL, USER_DEFINED = 3, 4
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name of a pre-tokeniser -> the regular expression it splits by
_PATTERNS = {
    "llama-bpe": rf"{_CONTRACTION}|\p{{N}}{{1,3}}{_TAIL}",
    "qwen2": rf"{_CONTRACTION}|\p{{N}}{_TAIL}",
}


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _plain() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _plain()]
    )


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _plain,
    "gpt-2": _plain,
    "smollm": _digits,
} | {name: (lambda p=p: _split(p)) for name, p in _PATTERNS.items()}


def gguf_tokenizer(file: GgufFile) -> Tokenizer | None:
    """The file's tokenizer, or None where it carries no vocabulary.

    Raises `LclmError` for vocabulary kinds that are not byte-level BPE or SPM.
    """
    kind = file.get("tokenizer.ggml.model", str)
    tokens = file.get("tokenizer.ggml.tokens", list)
    if kind is None or not tokens:
        return None
    builders = {"gpt2": _byte_level, "llama": _spm}
    if kind not in builders:
        raise unknown("GGUF tokenizer model", kind, builders)
    core = builders[kind](file, tokens)
    types = file.get("tokenizer.ggml.token_type", list, [])
    if types and len(types) != len(tokens):
        raise LclmError(
            f"{file.path}: {len(tokens)} tokens but {len(types)} token types"
        )
    core.add_special_tokens(
        [_added(t, True) for t, k in zip(tokens, types, strict=False) if k == CONTROL]
    )
    core.add_tokens(
        [
            _added(t, False)
            for t, k in zip(tokens, types, strict=False)
            if k == USER_DEFINED
        ]
    )
    return Tokenizer(core, specials=_specials(file, len(tokens), kind))


def _added(token: str, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _vocabulary(file: GgufFile, tokens: list[str]) -> dict[str, int]:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise LclmError(
            f"{file.path}: {len(tokens) - len(vocabulary)} of {len(tokens)} tokens "
            "occur twice in the vocabulary"
        )
    return vocabulary


def _byte_level(file: GgufFile, tokens: list[str]) -> tokenizers.Tokenizer:
    merges = file.get("tokenizer.ggml.merges", list)
    if merges is None:
        raise LclmError(f"{file.path}: a gpt2 vocabulary without merges")
    pre = file.get("tokenizer.ggml.pre", str, "default")
    if pre not in PRE_TOKENIZERS:
        raise unknown("GGUF pre-tokeniser", pre, PRE_TOKENIZERS)
    pairs = [tuple(m.split(" ", 1)) for m in merges]
    try:
        model = models.BPE(vocab=_vocabulary(file, tokens), merges=pairs)
    except Exception as error:  # the package raises plain Exception
        raise LclmError(f"{file.path}: unusable BPE merges: {error}") from error
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = PRE_TOKENIZERS[pre]()
    core.decoder = decoders.ByteLevel()
    return core


def _spm(file: GgufFile, tokens: list[str]) -> tokenizers.Tokenizer:
    """SentencePiece BPE: a merge ranks by the score of the piece that it makes."""
    scores = file.get("tokenizer.ggml.scores", list)
    if scores is None or len(scores) != len(tokens):
        raise LclmError(f"{file.path}: an SPM vocabulary needs one score a token")
    vocabulary = _vocabulary(file, tokens)
    unknown_id = file.get("tokenizer.ggml.unknown_token_id", int, 0)
    model = models.BPE(
        vocab=vocabulary,
        merges=_spm_merges(vocabulary, scores),
        unk_token=tokens[unknown_id] if unknown_id < len(tokens) else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    core = tokenizers.Tokenizer(model)
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *last,
        ]
    )
    return core


def _spm_merges(
    vocabulary: dict[str, int], scores: list[float]
) -> list[tuple[str, str]]:
    merges = []
    for piece, index in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                rank = (-scores[index], vocabulary[left], vocabulary[right])
                merges.append((rank, (left, right)))
    return [pair for _, pair in sorted(merges)]


def _specials(file: GgufFile, size: int, kind: str) -> Specials:
    def token(name: str) -> int | None:
        index = file.get(f"tokenizer.ggml.{name}", int)
        if index is not None and not 0 <= index < size:
            raise LclmError(f"{file.path}: {name} is {index}; there are {size} tokens")
        return index

    ends = (token("eos_token_id"), token("eot_token_id"))
    return Specials(
        bos=token("bos_token_id"),
        eos=tuple(dict.fromkeys(e for e in ends if e is not None)),
        pad=token("padding_token_id"),
        add_bos=file.get("tokenizer.ggml.add_bos_token", bool, kind == "llama"),
        chat_template=file.get("tokenizer.chat_template", str),
    )
