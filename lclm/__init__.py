"""lclm: language models over long contexts, in JAX."""

import importlib
from typing import Any

from lclm.errors import LclmError

__version__ = "0.1.0"
__all__ = [
    "Conversation",
    "LclmError",
    "caches",
    "evals",
    "load",
    "mixers",
    "patterns",
]


def __getattr__(name: str) -> Any:
    if name in ("load", "LanguageModel", "Context"):
        from lclm import language_model

        return getattr(language_model, name)
    if name == "Conversation":
        from lclm.conversation import Conversation

        return Conversation
    if name == "evals":  # the package is itself callable: lclm.evals() lists it
        return importlib.import_module("lclm.evals")
    raise AttributeError(f"module 'lclm' has no attribute {name!r}")


def caches() -> dict[str, str]:
    """Cache policies: name -> one-line description."""
    from lclm.cache import POLICIES

    return POLICIES.about()


def patterns() -> dict[str, str]:
    """Attention patterns: name -> one-line description."""
    from lclm.attention import PATTERNS

    return PATTERNS.about()


def mixers() -> dict[str, str]:
    """Token mixers: name -> one-line description."""
    from lclm.blocks import MIXERS

    return MIXERS.about()
