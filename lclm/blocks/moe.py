"""Feed-forward by a mixture of experts (Mixtral, Jamba)."""

import functools
from typing import Any

import flax.linen as nn

from lclm.blocks.attention import INIT, matrix
from lclm.blocks.mlp import activate
from lclm.ops import moe
from lclm.specs import MoeSpec
from lclm.typing import Array, Float


class Router(nn.Module):
    """The score of each expert: a matrix [E, D]."""

    experts: int

    @nn.compact
    def __call__(self, width: int) -> Any:
        return matrix(self, "weight", (self.experts, width))


class Stack(nn.Module):
    """The matrices of all experts, one array each."""

    spec: MoeSpec

    @nn.compact
    def __call__(self, width: int) -> moe.Experts:
        count, hidden = self.spec.experts, self.spec.width
        return moe.Experts(
            self._own("gate", (count, hidden, width)),
            self._own("up", (count, hidden, width)),
            self._own("down", (count, width, hidden)),
        )

    def _own(self, name: str, shape: tuple[int, int, int]) -> Any:
        if self.has_variable("params", name):
            return self.get_variable("params", name)
        return self.param(name, INIT, shape)


class Moe(nn.Module):
    """sum over chosen e of p_e down_e(act(gate_e(x)) * up_e(x)) (arXiv 2401.04088).

    Sows the router's probabilities [B, T, E] and choices [B, T, k] in the collection
    "router", for `lclm.ops.moe.aux_loss`.
    """

    spec: MoeSpec

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        spec, width = self.spec, x.shape[-1]
        flat = x.reshape(-1, width)
        to = moe.route(
            flat,
            Router(spec.experts, name="router")(width),
            top=spec.top,
            renormalise=spec.renormalise,
        )
        lead = x.shape[:-1]
        self.sow(moe.COLLECTION, moe.PROBABILITIES, to.probabilities.reshape(*lead, -1))
        self.sow(moe.COLLECTION, moe.CHOICE, to.choice.reshape(*lead, -1))
        act = functools.partial(activate, name=spec.activation)
        experts = Stack(spec, name="experts")(width)
        return moe.grouped(flat, to, experts, act=act).reshape(x.shape)
