"""`lclm` among lm-eval's models."""

from collections.abc import Iterable, Sequence
from typing import Any

import lm_eval.models  # noqa: F401 - lists its own models, if it is asked first
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

import lclm
from lclm import cache as policies
from lclm.errors import LclmError
from lclm.language_model import LanguageModel
from lclm.lm_eval.answers import Answers

UNSAID = (None, "cuda:0")  # the device that lm-eval names where nobody did
HELD = ("dtype", "packed", "quantize", "adapter", "rope")


@register_model("lclm")
class LclmHarness(Answers, LM):
    """A model of `lclm.load` under a cache policy, as lm-eval 0.4.13 asks for one.

    pretrained: what `lclm.load` takes, or what it returned. cache: a policy; lm-eval
    parts its arguments at commas, so what is no option here is taken for one of the
    policy (`cache=streaming:sinks=4,window=1020`). chunk, max_length, max_gen_toks:
    see `Answers`; dtype, packed, quantize, adapter and rope: see `lclm.load`.
    max_batch_size bounds lm-eval's automatic batches, which there are none of here.
    """

    def __init__(
        self,
        pretrained: str | LanguageModel,
        cache: Any = "full",
        *,
        chunk: int = 512,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
        **options: Any,
    ):
        LM.__init__(self)
        if device not in UNSAID:
            raise LclmError(
                f"device {device!r}: JAX takes the devices it finds; leave device out, "
                "and set JAX_PLATFORMS=cpu in the environment to keep to the CPU"
            )
        if not str(batch_size).isdigit():
            raise LclmError(f"batch_size is {batch_size!r}; give a whole number")
        held = {key: options.pop(key) for key in HELD if key in options}
        cache = policies.make(_spelled(cache, options))
        if isinstance(pretrained, str):
            pretrained = lclm.load(pretrained, **held)
        elif held:
            raise LclmError(f"{', '.join(held)}: this model has been loaded already")
        Answers.__init__(
            self,
            pretrained,
            cache=cache,
            chunk=chunk,
            batch_size=int(batch_size),
            max_length=max_length,
            max_gen_toks=max_gen_toks,
        )

    def watch(self, steps: Sequence[Any], label: str) -> Iterable[Any]:
        """lm-eval's progress bar."""
        return tqdm(steps, desc=label)

    def tell(self, kind: str, asked: tuple, answer: Any) -> None:
        """Answers of a run that is interrupted are kept with --use_cache."""
        self.cache_hook.add_partial(kind, asked, answer)


def _spelled(cache: Any, options: dict[str, Any]) -> Any:
    """The policy with the options that lm-eval cut off it."""
    if not options:
        return cache
    if not isinstance(cache, str):
        known = ", ".join(options)
        raise LclmError(f"unknown options {known}: a policy object takes none")
    cut = ",".join(f"{key}={value}" for key, value in options.items())
    return f"{cache}{',' if ':' in cache else ':'}{cut}"
