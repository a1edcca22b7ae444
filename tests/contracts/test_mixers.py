"""What every mixer owes: one function, any split of a text, any packing, any padding.

Each law runs on a whole decoder of one layer (its wiring and norms included), in
float64 to 1e-12 and in float32 to 2e-5 of the largest value.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm import cache as policies
from lclm.blocks.layer import init_states
from lclm.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, RopeSpec, Run
from lclm.models.decoder import Decoder, init_params
from lclm.specs import (
    FfnSpec,
    InfiniSpec,
    LayerNormSpec,
    Mamba2Spec,
    MambaSpec,
    MegalodonSpec,
    NormSpec,
    TimestepNormSpec,
)
from tests.tiny import lively

ROPE = RopeSpec(context=64)
LOCAL = AttentionSpec(4, 2, 8, ROPE)
LAYERS = {
    "attention": LayerSpec(LOCAL, MlpSpec(24)),
    "window": LayerSpec(AttentionSpec(4, 2, 8, ROPE, window=5), MlpSpec(24)),
    "mamba": LayerSpec(MambaSpec(12, 3, state=4), None),
    "mamba-jamba": LayerSpec(MambaSpec(12, 3, state=4, inner_norms=True), MlpSpec(24)),
    "mamba2": LayerSpec(Mamba2Spec(4, 4, state=4, groups=2, chunk=4), None),
    "megalodon": LayerSpec(
        MegalodonSpec(2, 8, 12, chunk=5, order=3, norm_groups=4),
        FfnSpec(24, gated=True),
        LayerNormSpec(),
        wiring="twohop",
    ),
    "infini-delta": LayerSpec(InfiniSpec(LOCAL, segment=4), MlpSpec(24)),
    "infini-linear": LayerSpec(InfiniSpec(LOCAL, segment=5, rule="linear"), None),
}
# A final norm with a state of its own.
FINAL = {"megalodon": TimestepNormSpec(4)}
RECURRENT = [name for name in LAYERS if name not in ("attention", "window")]
VOCAB, WIDTH, LENGTH = 31, 16, 14
TOLERANCE = {"float64": 1e-12, "float32": 2e-5}


def late(name: str, dtype: str) -> bool:
    """Whether a case waits for the slow tests: float32, and all mixers but one.

    Megalodon's, Infini's and Mamba-2's are the dearest; what they hold, and what
    attention does, is in files of their own.
    """
    variants = (
        "attention",
        "window",
        "mamba-jamba",
        "mamba2",
        "infini-linear",
        "infini-delta",
    )
    variants += ("megalodon",)
    return dtype == "float32" or name in variants


class Case:
    """One layer as a model, its compiled calls, and a text of two rows."""

    def __init__(self, name: str, dtype: str):
        layer = LAYERS[name]
        self.name, self.dtype = name, jnp.dtype(dtype)
        norm = FINAL.get(name, NormSpec())
        self.config = ModelConfig("test", VOCAB, WIDTH, (Run((layer,), 1),), 64, norm)
        self.policy = policies.make("full")
        params = lively(init_params(self.config, jax.random.key(0)), 0.2)
        self.params = self._cast(params)
        text = np.random.default_rng(3).integers(0, VOCAB, (2, LENGTH))
        self.text = jnp.asarray(text, jnp.int32)
        self.tolerance = TOLERANCE[dtype]
        self.call = jax.jit(self._call)
        self.slope = jax.jit(jax.grad(self._loss))
        self.slope_of_halves = jax.jit(jax.grad(self._loss_of_halves))

    def _cast(self, tree):
        return jax.tree.map(
            lambda x: (
                x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
            ),
            tree,
        )

    def states(self, rows: int = 2):
        """Fresh states, in the case's precision."""
        return self._cast(init_states(self.config, self.policy, rows, 32, self.dtype))

    def _call(self, params, tokens, positions, states=None, segments=None):
        start = jnp.max(positions, 1) + 1 - jnp.sum(positions >= 0, 1)
        start = jnp.where(jnp.max(positions, 1) < 0, 0, start).astype(jnp.int32)
        return Decoder(self.config, self.policy, dtype=self.dtype).apply(
            {"params": params},
            tokens,
            positions,
            segments,
            states,
            start=None if states is None else start,
        )

    def _loss(self, params, tokens, positions, segments):
        """A sum over real tokens that packing does not change."""
        hidden, _ = self._call(params, tokens, positions, segments=segments)
        weight = jnp.cos(jnp.arange(WIDTH, dtype=self.dtype))
        real = (positions >= 0)[..., None]
        return jnp.sum(jnp.where(real, jnp.sin(hidden) * weight, 0.0))

    def _loss_of_halves(self, params, tokens, positions, states):
        total = 0.0
        weight = jnp.cos(jnp.arange(WIDTH, dtype=self.dtype))
        for part in (slice(0, 6), slice(6, None)):
            hidden, states = self._call(
                params, tokens[:, part], positions[:, part], states
            )
            total += jnp.sum(jnp.sin(hidden) * weight)
        return total

    def positions(self, first: int, last: int, rows: int = 2):
        """Positions first .. last - 1 of every row."""
        return jnp.broadcast_to(
            jnp.arange(first, last, dtype=jnp.int32), (rows, last - first)
        )

    @functools.cached_property
    def whole(self):
        """Outputs and final states of one call over the text."""
        return self.call(
            self.params, self.text, self.positions(0, LENGTH), self.states()
        )

    def read(self, sizes):
        """The text in calls of these sizes."""
        outs, states, at = [], self.states(), 0
        for size in sizes:
            where = self.positions(at, at + size)
            out, states = self.call(
                self.params, self.text[:, at : at + size], where, states
            )
            outs.append(out)
            at += size
        return jnp.concatenate(outs, 1), states

    def same(self, got, want):
        """Equal trees, to the tolerance of the precision."""
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            a, b = np.asarray(a), np.asarray(b)
            size = max(1.0, float(np.abs(b).max(initial=0)))
            np.testing.assert_allclose(a, b, rtol=0, atol=self.tolerance * size)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((name, dtype), marks=[pytest.mark.slow] * late(name, dtype))
        for name in LAYERS
        for dtype in TOLERANCE
    ],
    ids="-".join,
)
def case(request):
    name, dtype = request.param
    with jax.enable_x64(dtype == "float64"):
        yield Case(name, dtype)


def test_any_split_of_a_text_gives_the_outputs_and_states_of_one_call(case):
    case.same(case.read([5, 1, 8]), case.whole)


def test_single_steps_give_the_outputs_and_states_of_one_call(case):
    case.same(case.read([1] * LENGTH), case.whole)


def test_a_parallel_pass_without_states_gives_the_same_outputs(case):
    out, none = case.call(case.params, case.text, case.positions(0, LENGTH))
    assert none is None
    case.same(out, case.whole[0])


def test_no_output_depends_on_a_later_token(case):
    changed = case.text.at[:, 9].set((case.text[:, 9] + 1) % VOCAB)
    where = case.positions(0, LENGTH)
    a, _ = case.call(case.params, case.text, where)
    b, _ = case.call(case.params, changed, where)
    case.same(a[:, :9], b[:, :9])
    assert not np.allclose(a[:, 9:], b[:, 9:], atol=1e-6)


def test_packed_documents_equal_documents_alone_and_so_do_gradients(case):
    cut = LENGTH // 2  # both documents take the same compiled calls
    where = jnp.concatenate(
        [case.positions(0, cut), case.positions(0, LENGTH - cut)], 1
    )
    ids = jnp.where(jnp.arange(LENGTH) < cut, 1, 2)[None].repeat(2, 0)
    packed, _ = case.call(case.params, case.text, where, None, ids)
    parts = [(case.text[:, :cut], where[:, :cut]), (case.text[:, cut:], where[:, cut:])]
    alone = [case.call(case.params, *part)[0] for part in parts]
    case.same(packed, jnp.concatenate(alone, 1))
    slope = case.slope(case.params, case.text, where, ids)
    slopes = [case.slope(case.params, *part, None) for part in parts]
    case.same(slope, jax.tree.map(jnp.add, *slopes))


def test_right_padding_leaves_what_is_carried_alone(case):
    pad = ((0, 0), (0, 3))
    text = jnp.pad(case.text[:, :7], pad)
    where = jnp.pad(case.positions(0, 7), pad, constant_values=-1)
    out, states = case.call(case.params, text, where, case.states())
    _, want = case.call(case.params, text[:, :7], where[:, :7], case.states())
    case.same(out[:, :7], case.whole[0][:, :7])
    rest = (case.text[:, 7:], case.positions(7, LENGTH))
    case.same(
        case.call(case.params, *rest, states)[0],
        case.call(case.params, *rest, want)[0],
    )
    if case.name in RECURRENT:
        case.same(states, want)


def test_left_padding_and_empty_calls_leave_a_recurrent_state_alone(case):
    if case.name not in RECURRENT:
        return  # rows are left-aligned for caches: slot = position
    pad = ((0, 0), (3, 0))
    text = jnp.pad(case.text[:, :7], pad)
    where = jnp.pad(case.positions(0, 7), pad, constant_values=-1)
    out, states = case.call(case.params, text, where, case.states())
    _, want = case.call(case.params, text[:, 3:], where[:, 3:], case.states())
    case.same(out[:, 3:], case.whole[0][:, :7])
    case.same(states, want)
    _, after = case.call(case.params, text, jnp.full_like(where, -1), want)
    case.same(after, want)


def test_a_new_document_forgets_a_recurrent_state(case):
    if case.name not in RECURRENT:
        return  # a cache's slots are positions of one document
    _, states = case.call(
        case.params, case.text[:, :6], case.positions(0, 6), case.states()
    )
    again = case.call(case.params, case.text, case.positions(0, LENGTH), states)
    case.same(again, case.whole)


def test_a_row_of_a_ragged_batch_is_the_row_alone(case):
    where = case.positions(0, LENGTH)
    where = where.at[1, 9:].set(-1)
    out, _ = case.call(case.params, case.text, where, case.states())
    alone, _ = case.call(case.params, case.text[:1], where[:1], case.states(rows=1))
    case.same(out[:1], alone)
    case.same(out[1, :9], case.whole[0][1, :9])


def test_gradients_flow_through_recurrent_states(case):
    if case.name not in RECURRENT:
        return  # caches are read by loops of a traced length, for inference only
    where = case.positions(0, LENGTH)
    got = case.slope_of_halves(case.params, case.text, where, case.states())
    want = case.slope(case.params, case.text, where, None)
    if case.dtype == jnp.float32:
        got, want = (jax.tree.map(lambda x: x / 10, t) for t in (got, want))
    case.same(got, want)


def test_rows_of_a_state_can_be_gathered(case):
    swap = jnp.array([1, 0])
    _, states = case.call(
        case.params, case.text[:, :6], case.positions(0, 6), case.states()
    )
    states = jax.tree.map(lambda leaf: leaf[swap], states)
    out, _ = case.call(
        case.params, case.text[swap, 6:], case.positions(6, LENGTH), states
    )
    case.same(out[swap], case.whole[0][:, 6:])
