"""The tokenizer files of a folder: tokenizer.json and what stands beside it."""

import json
from pathlib import Path
from typing import Any

from lclm.errors import LclmError
from lclm.hub.hf_config import eos_ids
from lclm.hub.json_file import read_json
from lclm.hub.tokenizer import ByteTokenizer, Specials, TextCodec, Tokenizer

CORE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"


def read_tokenizer(
    folder: Path, *, bos: int | None, eos: tuple[int, ...]
) -> Tokenizer | None:
    """The folder's tokenizer with its special ids and template; None without one."""
    if not (folder / CORE).is_file():
        return None
    core = Tokenizer.from_file(folder / CORE).core
    settings = _optional(folder / SETTINGS)
    generation = _optional(folder / GENERATION)

    def named(key: str) -> int | None:
        entry = settings.get(key)
        entry = entry.get("content") if isinstance(entry, dict) else entry
        return core.token_to_id(entry) if isinstance(entry, str) else None

    first = named("bos_token")
    bos = bos if first is None else first
    also = eos_ids(generation, str(folder / GENERATION))
    ends = dict.fromkeys(e for e in (named("eos_token"), *eos, *also) if e is not None)
    adds = settings.get("add_bos_token")
    if not isinstance(adds, bool):
        adds = bos is not None and core.encode("a").ids[:1] == [bos]
    return Tokenizer(
        core,
        specials=Specials(
            bos=bos,
            eos=tuple(ends),
            pad=named("pad_token"),
            add_bos=adds,
            chat_template=_template(folder, settings),
        ),
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    if (folder / TEMPLATE).is_file():
        try:
            return (folder / TEMPLATE).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise LclmError(f"{folder / TEMPLATE} is not UTF-8: {error}") from error
    found = settings.get("chat_template")
    if isinstance(found, list):  # several named ones: the default, else the first
        named = {
            t["name"]: t["template"]
            for t in found
            if isinstance(t, dict) and {"name", "template"} <= t.keys()
        }
        found = named.get("default", next(iter(named.values()), None))
    return found if isinstance(found, str) else None


def write_tokenizer(folder: Path, tokenizer: TextCodec) -> None:
    """Write what `read_tokenizer` reads back and transformers understands."""
    if isinstance(tokenizer, ByteTokenizer):
        tokenizer = tokenizer.as_tokenizer()
    if not isinstance(tokenizer, Tokenizer):
        raise LclmError(
            f"a {type(tokenizer).__name__} has no tokenizer.json form; save the model "
            "without a tokenizer"
        )
    specials = tokenizer.specials
    tokenizer.save(folder / CORE)

    def spelling(index: int | None) -> str | None:
        return None if index is None else tokenizer.core.id_to_token(index)

    table = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": spelling(specials.bos),
        "eos_token": spelling(specials.eos[0] if specials.eos else None),
        "pad_token": spelling(specials.pad),
        "add_bos_token": specials.add_bos,
        "chat_template": specials.chat_template,
    }
    kept = {k: v for k, v in table.items() if v is not None}
    text = json.dumps(kept, indent=2, ensure_ascii=False) + "\n"
    (folder / SETTINGS).write_text(text, encoding="utf-8")
    if len(specials.eos) > 1:
        ends = json.dumps({"eos_token_id": list(specials.eos)}, indent=2)
        (folder / GENERATION).write_text(ends + "\n")
