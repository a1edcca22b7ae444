"""Text to ids and back: the `tokenizers` package behind one small face."""

import codecs
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import tokenizers
from tokenizers import AddedToken, models
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel

from lclm.errors import LclmError
from lclm.hub.chat import render_chat


@runtime_checkable
class StreamDecoder(Protocol):
    """Turns ids into text as they come; never shows half a character."""

    def push(self, token: int) -> str:
        """The text that `token` completes, possibly empty."""
        ...

    def flush(self) -> str:
        """What is left at the end; incomplete bytes become U+FFFD."""
        ...


@runtime_checkable
class TextCodec(Protocol):
    """What the rest of the library asks of a tokenizer."""

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    add_bos: bool

    def encode(self, text: str, *, bos: bool = False) -> list[int]: ...

    def decode(self, ids: Iterable[SupportsIndex], *, special: bool = False) -> str: ...

    def stream(self, *, special: bool = False) -> StreamDecoder: ...

    def chat(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True
    ) -> str: ...


@dataclass(frozen=True)
class Specials:
    """The ids with a meaning, and the chat template, as a model's files give them."""

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    add_bos: bool = False
    chat_template: str | None = None


class Tokenizer:
    """A `tokenizers.Tokenizer` with its special ids and chat template.

    `add_bos` says whether the model was trained with a BOS in front of every text.
    """

    def __init__(self, core: tokenizers.Tokenizer, *, specials: Specials = Specials()):
        self.core = core
        self.specials = specials
        self.vocab_size = core.get_vocab_size(with_added_tokens=True)
        self.bos_id, self.eos_ids = specials.bos, specials.eos
        self.pad_id, self.add_bos = specials.pad, specials.add_bos
        self._special_ids = {
            i for i, t in core.get_added_tokens_decoder().items() if t.special
        }

    @classmethod
    def from_file(
        cls, path: str | Path, *, specials: Specials = Specials()
    ) -> "Tokenizer":
        """Read a tokenizer.json; raises `LclmError` if it is not one."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)), specials=specials)
        except Exception as error:  # the package raises plain Exception for bad files
            raise LclmError(f"{path} is not a tokenizer.json: {error}") from error

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Ids of `text`, special spellings recognised; `bos` puts BOS in front."""
        ids = self.core.encode(text, add_special_tokens=False).ids
        if not bos:
            return ids
        if self.bos_id is None:
            raise LclmError("this tokenizer has no BOS token; encode with bos=False")
        return [self.bos_id, *ids]

    def decode(self, ids: Iterable[SupportsIndex], *, special: bool = False) -> str:
        """Text of `ids`; special tokens are left out unless `special`."""
        return self.core.decode([int(i) for i in ids], skip_special_tokens=not special)

    def stream(self, *, special: bool = False) -> StreamDecoder:
        """A fresh incremental decoder: pushes and a flush add up to `decode`."""
        hidden = frozenset() if special else frozenset(self._special_ids)
        if isinstance(self.core.decoder, ByteLevelDecoder):
            return _ByteStream(lambda i: _level_bytes(self.core.id_to_token(i)), hidden)
        return _WindowStream(self, hidden)

    def chat(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt text that the model's template makes of role/content messages.

        Raises `LclmError` where the model has no template or the template refuses.
        """
        names = {
            "bos_token": self._token(self.bos_id),
            "eos_token": self._token(self.eos_ids[0] if self.eos_ids else None),
        }
        return render_chat(
            self.specials.chat_template,
            messages,
            names=names,
            add_generation_prompt=add_generation_prompt,
        )

    def save(self, path: str | Path) -> None:
        """Write the tokenizer.json."""
        self.core.save(str(path))

    def _token(self, index: int | None) -> str:
        return "" if index is None else self.core.id_to_token(index) or ""


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, then BOS 256, EOS 257, PAD 258."""

    vocab_size = 259
    bos_id: int | None = 256
    eos_ids: tuple[int, ...] = (257,)
    pad_id: int | None = 258
    add_bos = False
    specials = Specials(bos=256, eos=(257,), pad=258)

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """The UTF-8 bytes of `text`."""
        return [256] * bos + list(text.encode("utf-8"))

    def decode(self, ids: Iterable[SupportsIndex], *, special: bool = False) -> str:
        """Bytes back to text; broken UTF-8 becomes U+FFFD, other ids vanish."""
        raw = bytes(int(i) for i in ids if 0 <= int(i) < 256)
        return raw.decode("utf-8", errors="replace")

    def stream(self, *, special: bool = False) -> StreamDecoder:
        """A fresh incremental decoder."""
        return _ByteStream(lambda i: bytes([i]) if i < 256 else b"", frozenset())

    def chat(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """Bytes have no template: always an `LclmError`."""
        return render_chat(
            None, messages, names={}, add_generation_prompt=add_generation_prompt
        )

    def as_tokenizer(self) -> Tokenizer:
        """The same ids as a `Tokenizer`, which has a file form."""
        core = tokenizers.Tokenizer(models.BPE(vocab=dict(_GPT2_BYTES), merges=[]))
        core.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = ByteLevelDecoder()
        names = ("<bos>", "<eos>", "<pad>")
        core.add_special_tokens([AddedToken(n, special=True) for n in names])
        return Tokenizer(core, specials=self.specials)


class _ByteStream:
    """For byte-level vocabularies: each token is some bytes, UTF-8 joins them."""

    def __init__(self, token_bytes: Callable[[int], bytes], hidden: frozenset[int]):
        self._bytes, self._hidden = token_bytes, hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        token = int(token)
        return "" if token in self._hidden else self._utf8.decode(self._bytes(token))

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


class _WindowStream:
    """For other vocabularies: decode a short window twice and show the difference.

    A run of SentencePiece byte tokens is text only if the whole run is valid UTF-8, so
    a run waits for its end.
    """

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int]):
        self._decode, self._hidden = tokenizer.decode, hidden
        self._piece = tokenizer.core.id_to_token
        self._window: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        if int(token) in self._hidden:
            return ""
        self._window.append(int(token))
        if _BYTE_PIECE.fullmatch(self._piece(int(token)) or ""):
            return ""
        text = self._text()
        if text.endswith("\ufffd"):
            return ""
        before = self._decode(self._window[: self._shown], special=True)
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return text[len(before) :]

    def flush(self) -> str:
        text = self._text()
        before = self._decode(self._window[: self._shown], special=True)
        self._window, self._shown = [], 0
        return text[len(before) :]

    def _text(self) -> str:
        return self._decode(self._window, special=True)


def _gpt2_bytes() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    stand_ins = [*printable, *(256 + i for i in range(len(rest)))]
    return {chr(c): b for c, b in zip(stand_ins, [*printable, *rest], strict=True)}


_GPT2_BYTES = _gpt2_bytes()


def _level_bytes(token: str | None) -> bytes:
    """The bytes of a byte-level token; an added token is its own UTF-8."""
    try:
        return bytes(_GPT2_BYTES[c] for c in token or "")
    except KeyError:
        return (token or "").encode("utf-8")
