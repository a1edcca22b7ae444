"""The largest of many scores by a threshold, not by sorting, on TPU (Mosaic TPU).

Eight rows of scores are held at once. The threshold is found bit by bit, 32 counts of
how many scores reach it; places are then running sums of who does, and the j-th number
is how many running sums do not exceed j.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu import _INTERPRET, _product
from pallas_kernels.decode import pages

ROWS, LANES = 8, 128
WIDE = 1024  # scores of a row that are counted at once
MOST = 256 * LANES  # scores of a row: partial sums of places are exact in bfloat16
LIST = 512  # longest list
_LEAST, _NOTHING = -(1 << 31), -2139095041  # the first of keys, the key of -inf


def best(score: jax.Array, count: int) -> jax.Array:
    """Where the `count` largest of float32 scores [..., n] are, -1 for those of -inf.

    In rising order, those first; of equal scores the first ones. More scores or a
    longer list than the kernel holds are left to XLA.
    """
    *lead, n = score.shape
    if n > MOST or count > LIST:
        return pages._best(score, count)
    rows = score.reshape(-1, n)
    size, width = -(-n // WIDE) * WIDE, -(-count // LANES) * LANES
    pads = ((0, -len(rows) % ROWS), (0, size - n))
    rows = jnp.pad(rows, pads, constant_values=-jnp.inf)
    found = pl.pallas_call(
        functools.partial(_best, count),
        grid=(len(rows) // ROWS,),
        in_specs=[pl.BlockSpec((ROWS, size), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((ROWS, width), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((len(rows), width), jnp.float32),
        scratch_shapes=[
            pltpu.VMEM((ROWS, size), jnp.int32),
            pltpu.VMEM((ROWS, size), jnp.float32),
        ],
        interpret=_INTERPRET.value,
        name="attention_select",
    )(rows)
    found = found[: score.size // n, :count].astype(jnp.int32)
    return jnp.where(found < n, found, -1).reshape(*lead, count)


def _best(count, score, out, key, place):
    bits = lax.bitcast_convert_type(score[...], jnp.int32)
    key[...] = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # in the order of the scores
    size = score.shape[1]

    def total(holds):
        """How many keys of each row `holds`, [ROWS, 1]."""

        def some(i, sums):
            at = pl.ds(pl.multiple_of(i * WIDE, WIDE), WIDE)
            return sums + jnp.where(holds(key[:, at]), 1.0, 0.0)

        sums = jnp.zeros((ROWS, WIDE), jnp.float32)
        sums = lax.fori_loop(0, size // WIDE, some, sums)
        return sums.sum(1, keepdims=True)

    def bit(i, least):
        more = least + lax.shift_left(jnp.int32(1), 31 - i)
        return jnp.where(total(lambda x: x >= more) >= count, more, least)

    least = lax.fori_loop(0, 32, bit, jnp.full((ROWS, 1), _LEAST, jnp.int32))
    equal = count - total(lambda x: x > least)
    _places(key, place, least, equal)
    for row in range(ROWS):

        def part(i, carry, row=row):
            first = pl.multiple_of(i * LANES, LANES)
            out[pl.ds(row, 1), pl.ds(first, LANES)] = _listed(place, row, first)
            return carry

        lax.fori_loop(0, out.shape[1] // LANES, part, 0)


def _places(key, place, least, equal):
    """Running sums of who is chosen: above `least`, and the first `equal` at it."""
    shape = (LANES, LANES)
    before = lax.broadcasted_iota(jnp.int32, shape, 0)
    before = before <= lax.broadcasted_iota(jnp.int32, shape, 1)
    before = jnp.where(before, 1.0, 0.0).astype(jnp.bfloat16)

    def running(flags, sums):
        part = _product(jnp.where(flags, 1.0, 0.0).astype(jnp.bfloat16), before, (1, 0))
        return part + sums

    def some(i, sums):
        chosen, ties = sums
        at = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
        mine = key[:, at]
        tie = mine == least
        rank = running(tie, ties)
        taken = ((mine > least) | (tie & (rank <= equal))) & (mine > _NOTHING)
        place[:, at] = so_far = running(taken, chosen)
        return so_far[:, -1:], rank[:, -1:]

    none = jnp.zeros((ROWS, 1), jnp.float32)
    lax.fori_loop(0, key.shape[1] // LANES, some, (none, none))


def _listed(place, row: int, first):
    """[1, LANES]: how many running sums of a row are at most `first` and so on."""

    def half(first):
        shape = (LANES // 2, LANES)
        number = (lax.broadcasted_iota(jnp.int32, shape, 0) + first).astype(jnp.float32)

        def some(i, sums):
            at = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
            return sums + jnp.where(place[pl.ds(row, 1), at] <= number, 1.0, 0.0)

        sums = jnp.zeros(shape, jnp.float32)
        return lax.fori_loop(0, place.shape[1] // LANES, some, sums)

    sums = jnp.concatenate([half(first), half(first + LANES // 2)], 0)
    ones = jnp.ones((ROWS, LANES), jnp.bfloat16)
    return _product(ones, sums.astype(jnp.bfloat16), (1, 1))[:1]
