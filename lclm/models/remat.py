"""What the backward pass keeps, offloads to the host, and computes again, by name."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from lclm.errors import LclmError, unknown

# Arrays that the blocks and the operations name with `checkpoint_name`: the input of
# each layer, attention's output and log-sum-exp, outputs and some states of scans, and
# projections by their own names (of attention, of the gated feed-forward, of recurrent
# mixers).
ATTENTION = ("attention_out", "attention_lse")
SCANS = ("scan_out", "scan_states")
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down", "in", "x", "out")
NAMES = ("layer_input", *ATTENTION, *SCANS, *PROJECTIONS)

# Preset -> (kept, offloaded).
PRESETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "none": (NAMES, ()),
    "products": ((*ATTENTION, *SCANS, *PROJECTIONS), ()),
    "full": ((), ()),
    "attention": (ATTENTION, ()),
    "attention_offload": (ATTENTION, ("layer_input",)),
    "offload": ((), ("layer_input", *ATTENTION)),
}


@dataclass(frozen=True)
class RematSpec:
    """A preset of what is kept between the passes, and changes to it by name.

    "none" keeps everything; "products" keeps what projections, attention and scans
    gave, and does norms, activations and rotations again; "full" keeps the input of
    each layer (of each group where groups are scanned) and computes the rest again;
    "attention" keeps attention's outputs and log-sum-exp beside it, whose recomputation
    would cost T^2; "attention_offload" is that with the inputs in the host's memory,
    "offload" with all three there. `save` and `offload` say it for further arrays of
    `NAMES`.
    """

    kind: str = "none"
    save: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()

    def __post_init__(self):
        if self.kind not in PRESETS:
            raise unknown("remat preset", self.kind, PRESETS)
        for name in (*self.save, *self.offload):
            if name not in NAMES:
                raise unknown("array of remat", name, NAMES)
        if self.kind == "none" and (self.save or self.offload):
            raise LclmError(
                "remat kind 'none' keeps everything: give kind='full' beside save or "
                "offload"
            )
        if both := set(self.save) & set(self.offload):
            raise LclmError(f"remat: {sorted(both)} in save and in offload: choose one")

    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What is kept on the device, and what in the host's memory."""
        saved, offloaded = PRESETS[self.kind]
        offload = {*(n for n in offloaded if n not in self.save), *self.offload}
        save = {*saved, *self.save} - offload
        return tuple(sorted(save)), tuple(sorted(offload))

    def wrap(self, module: type[nn.Module], **options: Any) -> type[nn.Module]:
        """The module class with this rule around its call."""
        if self.kind == "none":
            return module
        save, offload = self.names()
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=save,
            names_which_can_be_offloaded=offload,
            offload_src="device",
            offload_dst="pinned_host",
        )
        return nn.remat(module, policy=policy, **options)


NO_REMAT = RematSpec()
