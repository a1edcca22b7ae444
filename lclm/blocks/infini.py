"""Infini-attention as a mixer: attention inside segments, a memory of the others."""

from typing import Any

import flax.linen as nn
import jax

from lclm.blocks.attention import project
from lclm.blocks.norms import Norm
from lclm.cache.base import CachePolicy
from lclm.cache.step import Step
from lclm.config import NormSpec
from lclm.errors import LclmError
from lclm.ops.infini import InfiniState, empty_state, infini_attention
from lclm.specs import InfiniSpec
from lclm.typing import Array, Float

GATE_RATE = 0.01


def is_gate(path: str) -> bool:
    """Whether a parameter path such as "layers_3/infini/gate" is a memory gate.

    Gates need a learning rate of their own (`GATE_RATE`) and no weight decay: at the
    rate of the other parameters they stay where they began, near 0.5.
    """
    return f"/{path}".endswith("/infini/gate")


class Infini(nn.Module):
    """Infini-attention (arXiv 2404.07143), exact for any split of a text into calls."""

    spec: InfiniSpec
    width: int
    norm: NormSpec
    index: int = 0
    policy: CachePolicy | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], step: Step, state: InfiniState | None = None
    ) -> tuple[Float[Array, "B T D"], InfiniState | None]:
        spec = self.spec
        attention = spec.attention
        if state is not None:
            self._check(state, x.shape[0])
        start = nn.initializers.constant(spec.gate)
        gate = self.param("gate", start, (attention.heads,))
        q, k, v = self._heads(x)
        out, state = infini_attention(
            q,
            k,
            v,
            gate,
            step.positions,
            spec=spec,
            turn=lambda y, at: step.rotate_to(y, at, attention.rope),
            state=state,
            packed=step.segments is not None,
        )
        out = out.astype(x.dtype).reshape(*x.shape[:2], -1)
        return project(self, "o", out, self.width, bias=attention.out_bias), state

    @staticmethod
    def init_state(spec: InfiniSpec, width: int, batch: int, dtype: Any) -> InfiniState:
        """An empty memory and an empty open segment."""
        return empty_state(spec, batch, dtype)

    def _heads(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values without positions."""
        spec, size = self.spec.attention, self.spec.attention.head_dim

        def split(name: str, count: int) -> Array:
            y = project(self, name, x, count * size, bias=spec.qkv_bias)
            return y.reshape(*x.shape[:2], count, size)

        q, k = split("q", spec.heads), split("k", spec.kv_heads)
        if spec.qk_norm:
            q = Norm(self.norm, name="q_norm")(q)
            k = Norm(self.norm, name="k_norm")(k)
        return q, k, split("v", spec.kv_heads)

    def _check(self, state: InfiniState, batch: int) -> None:
        """Refuse a state that was made for other rows or another layer."""
        want = jax.eval_shape(lambda: empty_state(self.spec, batch, state.k.dtype))
        for name in ("memory", "norm", "open_memory", "open_norm", "k", "v"):
            found, right = getattr(state, name).shape, getattr(want, name).shape
            if found != right:
                raise LclmError(
                    f"Infini-attention state {name} is {found}; {batch} rows of this "
                    f"layer need {right}: make it with init_state for this batch"
                )
