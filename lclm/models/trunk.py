"""The decoder as training sees it: flat parameters in, hidden states and losses out."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lclm.attention.context import Context
from lclm.config import AttentionSpec, ModelConfig
from lclm.models.decoder import Decoder, loss_table
from lclm.models.remat import NO_REMAT, RematSpec
from lclm.ops.int8 import Int8Weight
from lclm.ops.loss import token_nll, weighted_nll
from lclm.ops.moe import COLLECTION, aux_loss
from lclm.ops.packed import PackedWeight
from lclm.specs import MoeSpec
from lclm.tree import flatten
from lclm.typing import Array, Batch, Float, Params

# Names of matrices that activations are multiplied with, parts of adapters included.
WEIGHTS = ("weight", "table", "gate", "up", "down", "base")


@dataclass(frozen=True)
class Trunk:
    """How a decoder runs in training.

    `dtype` is the type of activations and of the weights they meet; `scan` runs each
    repeated group as one loop over stacked parameters (see `stack_params`), which
    keeps compile time independent of depth; `loss_chunk` tokens have logits at a time.
    `context` says how devices share the rows' tokens, None for whole rows.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    scan: bool = True
    remat: RematSpec = NO_REMAT
    loss_chunk: int = 512
    context: Context | None = None

    @property
    def routed(self) -> bool:
        """Whether a layer chooses experts, and so has a balance loss."""
        return any(isinstance(s.mlp, MoeSpec) for s in self.config.layers)

    def decoder(self) -> nn.Module:
        """The module that `hidden` applies."""
        return Decoder(
            self.config,
            scan=self.scan,
            remat=self.remat,
            dtype=self.dtype,
            context=self.context,
        )

    def hidden(
        self, params: Params, batch: Batch
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """Final hidden states, and the experts' balance loss (0 without experts)."""
        inputs = (batch["tokens"], batch["positions"], batch["segments"])
        variables = {"params": self.cast(params)}
        if not self.routed:
            return self.decoder().apply(variables, *inputs)[0], jnp.float32(0.0)
        (hidden, _), sown = self.decoder().apply(
            variables, *inputs, mutable=[COLLECTION]
        )
        return hidden, aux_loss(sown[COLLECTION], batch["positions"] >= 0)

    def probed(
        self, params: Params, batch: Batch, probe: Any, own: Params
    ) -> tuple[Float[Array, "B T D"], Params]:
        """Final hidden states under a probe (`lclm.blocks.attention.Probe`).

        `own` holds the probe's parameters, [attention layers, ...] each, which keep
        their type. Also returns what was sown under each name, summed over layers.
        """
        inputs = (batch["tokens"], batch["positions"], batch["segments"])
        tree = self.cast({k: v for k, v in params.items() if k != "objective"})
        tree = _with_probe(self.config, tree, own, scan=self.scan)
        (hidden, _), sown = self.decoder().apply(
            {"params": tree}, *inputs, probe=probe, mutable=["probe", COLLECTION]
        )
        sums: dict[str, Any] = {}
        for path, values in flatten(dict(sown.get("probe", {}))).items():
            name = path.split("/")[-1]
            sums[name] = sums.get(name, 0.0) + sum(jnp.sum(v) for v in values)
        return hidden, sums

    def token_nll(
        self, params: Params, hidden: Float[Array, "B T D"], batch: Batch
    ) -> Float[Array, "B T"]:
        """Loss in nats of every target; 0 where its weight is 0."""
        counted = jnp.where(batch["weights"] > 0, batch["targets"], -1)
        return token_nll(hidden, self._table(params), counted, **self._loss_options())

    def weighted_nll(
        self, params: Params, hidden: Float[Array, "B T D"], batch: Batch
    ) -> Float[Array, ""]:
        """Losses in nats times their weights, added up: what is differentiated."""
        return weighted_nll(
            hidden,
            self._table(params),
            batch["targets"],
            batch["weights"],
            **self._loss_options(),
        )

    def _table(self, params: Params) -> Any:
        read = {k: params[k] for k in ("embed", "head") if k in params}
        return loss_table(self.config, self.cast(read), self.dtype)

    def _loss_options(self) -> dict[str, Any]:
        return {"chunk": self.loss_chunk, "softcap": self.config.final_softcap}

    def cast(self, params: Params) -> Params:
        """Dense matrices in the type of the activations.

        Vectors stay as they are (those of scanned layers, [repeats, D], too), and so do
        matrices that are no weights of a product, such as Mamba's decays.
        """

        def packed(leaf: Any) -> bool:
            return isinstance(leaf, PackedWeight | Int8Weight)

        def narrow(path: tuple, leaf: Any) -> Any:
            names = [getattr(key, "key", getattr(key, "name", "")) for key in path]
            names = [name for name in names if name != "part"]  # sharding.Split
            axes = 0 if packed(leaf) else leaf.ndim - names[0].startswith("run_")
            return (
                leaf.astype(self.dtype) if axes > 1 and names[-1] in WEIGHTS else leaf
            )

        return jax.tree_util.tree_map_with_path(narrow, params, is_leaf=packed)


def _with_probe(
    config: ModelConfig, params: Params, own: Params, *, scan: bool
) -> Params:
    """Parameters with each attention layer's part of `own` beside its projections."""
    mixers = [isinstance(s.mixer, AttentionSpec) for s in config.layers]
    index = np.cumsum(mixers) - 1
    out = dict(params)

    def put(block: Params, at: Any) -> Params:
        part = jax.tree.map(lambda leaf: leaf[at], own)
        return block | {"attn": block["attn"] | {"probe": part}}

    if not scan:
        for i in np.flatnonzero(mixers):
            out[f"layers_{i}"] = put(out[f"layers_{i}"], int(index[i]))
        return out
    first = 0
    for r, run in enumerate(config.stack):
        size = len(run.group)
        blocks = dict(out[f"run_{r}"])
        for j, spec in enumerate(run.group):
            if isinstance(spec.mixer, AttentionSpec):
                at = index[first + j + size * np.arange(run.repeats)]
                blocks[f"block_{j}"] = put(blocks[f"block_{j}"], at)
        out[f"run_{r}"] = blocks
        first += size * run.repeats
    return out
