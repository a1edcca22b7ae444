"""The only model: an embedding, a stack of layers described by data, a norm, a head."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lclm import sharding
from lclm.attention.context import Context
from lclm.blocks.attention import matrix
from lclm.blocks.layer import DecoderLayer
from lclm.blocks.norms import apply_final_norm, final_norm
from lclm.cache.base import CachePolicy, layers_of
from lclm.cache.step import Step, make_step
from lclm.config import LayerSpec, ModelConfig, Run
from lclm.models.remat import NO_REMAT, RematSpec
from lclm.ops.int8 import Int8Weight
from lclm.ops.linear import linear
from lclm.ops.packed import PackedWeight, dequantize
from lclm.typing import Array, Float, Int, Params

Caches = tuple[Any, ...]


class Table(nn.Module):
    """Token embeddings [V, D]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], dtype: Any) -> Array:
        config = self.config
        table = matrix(self, "table", (config.vocab, config.width))
        if isinstance(table, PackedWeight | Int8Weight):
            rows = table.take(tokens, dtype)
        else:
            rows = table[tokens].astype(dtype)
        if config.embed_scale is not None:
            # Hugging Face rounds the factor to the type the model is stored in.
            rows = rows * jnp.asarray(config.embed_scale, table.dtype).astype(dtype)
        return rows


class Head(nn.Module):
    """The output matrix of an untied model; `logits` applies it."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Any:
        return matrix(self, "weight", (self.config.vocab, self.config.width))


def gathered(module: type[nn.Module]) -> type[nn.Module]:
    """The module class reading whole parameters where its device has parts of them.

    Inside a rematerialised layer, so the whole ones do not outlive its pass.
    """
    if not sharding.inside():
        return module
    return nn.map_variables(module, "params", sharding.gather)


class Group(nn.Module):
    """The layers one scan repeats."""

    run: Run
    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, step: Step) -> tuple[Array, None]:
        for j, spec in enumerate(self.run.group):
            layer = DecoderLayer(spec, self.width, dtype=self.dtype, name=f"block_{j}")
            x, _ = layer(x, step)
        return x, None


class Decoder(nn.Module):
    """tokens -> final hidden states, and the caches where they were given.

    `scan` runs each repeated group as one `lax.scan` over stacked parameters (see
    `stack_params`): compile time then does not grow with depth. `remat` says what
    the backward pass computes again. `dtype` is the type of the residual stream.
    `context` says how devices share the rows' tokens.
    """

    config: ModelConfig
    policy: CachePolicy | None = None
    scan: bool = False
    remat: RematSpec = NO_REMAT
    dtype: Any = jnp.float32
    context: Context | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        caches: Caches | None = None,
        *,
        start: Int[Array, " B"] | None = None,
        length: Int[Array, " B"] | None = None,
        policy_params: Any = None,
        weigh: bool = False,
        probe: Any = None,
    ) -> tuple[Float[Array, "B T D"], Caches | None]:
        config = self.config
        if positions is None:
            positions = document_positions(tokens, segments)
        step = make_step(
            config,
            positions,
            segments=segments,
            start=start,
            length=length,
            far=None if self.policy is None else self.policy.far(positions),
            policy=policy_params,
            exact=self.policy is not None and self.policy.exact_angles,
            weigh=weigh,
        )
        step = dataclasses.replace(step, probe=probe, context=self.context)
        residual = jnp.float32 if config.residual_float32 else self.dtype
        x = Table(config, name="embed")(tokens, residual)
        if not config.tied:
            Head(config, name="head")()
        if self.scan:
            x = self._scanned(x, step)
        else:
            x, caches = self._unrolled(x, step, caches)
        x, caches = apply_final_norm(config.norm, x, step, caches)
        return x.astype(self.dtype), caches

    def _unrolled(
        self, x: Array, step: Step, caches: Caches | None
    ) -> tuple[Array, Caches | None]:
        new = []
        layer_class = self.remat.wrap(gathered(DecoderLayer))
        policies = {}
        if self.policy is not None:
            policies = {x.index: self.policy.over(x) for x in layers_of(self.config)}
        for i, spec in enumerate(self.config.layers):
            layer = layer_class(
                spec,
                self.config.width,
                i,
                policies.get(i),
                self.dtype,
                name=f"layers_{i}",
            )
            x, cache = layer(x, step, None if caches is None else caches[i])
            new.append(cache)
        return x, None if caches is None else (*new, *caches[len(new) :])

    def _scanned(self, x: Array, step: Step) -> Array:
        group = self.remat.wrap(gathered(Group), prevent_cse=False)
        for r, run in enumerate(self.config.stack):
            stacked = nn.scan(
                group,
                variable_axes={"params": 0, "router": 0, "probe": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=run.repeats,
            )
            x, _ = stacked(run, self.config.width, self.dtype, name=f"run_{r}")(x, step)
        return x


def document_positions(
    tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None
) -> Int[Array, "B T"]:
    """Each token's index in its own document; -1 for padding (segment 0)."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segments is None:
        return index
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    start = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    return jnp.where(segments > 0, index - start, -1)


def init_params(config: ModelConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Fresh parameters, one sub-tree per layer."""
    params = Decoder(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter path of the model with its shape; nothing is allocated."""
    shapes = {"embed/table": (config.vocab, config.width)}
    kinds = {spec: _layer_shapes(config, spec) for spec in set(config.layers)}
    for i, spec in enumerate(config.layers):
        for path, shape in kinds[spec].items():
            shapes[f"layers_{i}/{path}"] = shape
    norm = _shapes(config, final_norm(config.norm))
    shapes |= {f"final_norm/{p}": s for p, s in norm.items()}
    if not config.tied:
        shapes["head/weight"] = (config.vocab, config.width)
    return shapes


def _layer_shapes(config: ModelConfig, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
    one = jnp.zeros((1, 1), jnp.int32)
    return _shapes(config, DecoderLayer(spec, config.width), make_step(config, one))


def _shapes(config: ModelConfig, module: nn.Module, *rest: Any) -> dict[str, Any]:
    def build() -> Params:
        x = jnp.zeros((1, 1, config.width))
        return module.init(jax.random.key(0), x, *rest)["params"]

    flat, _ = jax.tree_util.tree_flatten_with_path(jax.eval_shape(build))
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in flat}


def unembed(
    config: ModelConfig, params: Params, hidden: Float[Array, "... D"]
) -> Float[Array, "... V"]:
    """float32 logits of final hidden states."""
    table = output_table(config, params)
    logits = linear(hidden, table).astype(jnp.float32)
    if config.final_softcap is not None:
        logits = jnp.tanh(logits / config.final_softcap) * config.final_softcap
    return logits


def untied(params: Params) -> Params:
    """Parameters of a tied model as those of an untied one: the same table twice."""
    return params | {"head": {"weight": params["embed"]["table"]}}


def output_table(config: ModelConfig, params: Params) -> Any:
    """The [V, D] matrix that turns hidden states into logits."""
    table = params["embed"]["table"] if config.tied else params["head"]["weight"]
    return sharding.gather(table)


def loss_table(config: ModelConfig, params: Params, dtype: Any) -> Any:
    """The output matrix as `token_nll` takes it: dense in `dtype`, or int8 rows."""
    table = output_table(config, params)
    return table if isinstance(table, Int8Weight) else dequantize(table, dtype)


def stack_params(config: ModelConfig, params: Params) -> Params:
    """Per-layer parameters -> one stacked sub-tree per run, as `scan=True` reads."""
    out = {k: v for k, v in params.items() if not k.startswith("layers_")}
    at = 0
    for r, run in enumerate(config.stack):
        size = len(run.group)
        out[f"run_{r}"] = {
            f"block_{j}": jax.tree.map(
                lambda *leaves: jnp.stack(leaves),
                *(params[f"layers_{at + n * size + j}"] for n in range(run.repeats)),
            )
            for j in range(size)
        }
        at += size * run.repeats
    return out


def unstack_params(config: ModelConfig, params: Params) -> Params:
    """The inverse of `stack_params`."""
    out = {k: v for k, v in params.items() if not k.startswith("run_")}
    at = 0
    for r, run in enumerate(config.stack):
        for n in range(run.repeats):
            for j in range(len(run.group)):
                block = params[f"run_{r}"][f"block_{j}"]
                out[f"layers_{at}"] = jax.tree.map(lambda leaf, n=n: leaf[n], block)
                at += 1
    return out
