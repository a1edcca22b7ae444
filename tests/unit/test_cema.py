"""The complex EMA and the timestep norm: every form is the token loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm.ops import cema as ops
from lclm.ops import timestep_norm as norms

B, T, D, N, G = 2, 37, 4, 3, 2
AT = np.arange(T)


def rows(*parts):
    return jnp.asarray(np.stack(parts), jnp.int32)


POSITIONS = {
    "plain": rows(5 + AT, AT),
    "right padding": rows(np.where(AT < 20, 5 + AT, -1), np.full(T, -1)),
    "left padding": rows(np.maximum(AT - 21, -1), np.maximum(AT - 3, -1)),
    "packed": rows(np.where(AT < 11, AT + 2, AT - 11), np.where(AT < 5, AT, AT - 5)),
    "holes": rows(np.where(AT % 3 == 1, -1, AT + 1), np.where(AT % 5 == 2, -1, AT)),
    "many documents": rows(AT % 2, np.where(AT % 7 == 6, -1, AT % 7)),
}


@pytest.fixture(autouse=True)
def double_and_blocks_of_eight(monkeypatch):
    monkeypatch.setattr(ops, "BLOCK", 8)
    monkeypatch.setattr(ops, "SHORT", 1)
    monkeypatch.setattr(norms, "OPEN", 8)
    monkeypatch.setattr(norms, "SHORT", 1)
    with jax.enable_x64():
        yield


def waves(*shape, a):
    """sin(a (m + 1)) over the flat index m."""
    return jnp.sin(a * (jnp.arange(np.prod(shape)) + 1.0)).reshape(shape)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def stored(seed=0):
    shapes = ((D, N, 1), (D, N, 1), (D, 1, 1), (D, N, 2), (D, 1))
    return tuple(draw(*shape, seed=seed + i) for i, shape in enumerate(shapes))


def loop(x, params, state, positions):
    """The recurrence in complex numbers."""
    c = ops.coefficients(*params)
    q, g, h = c.q_re + 1j * c.q_im, c.g_re + 1j * c.g_im, state[:, 0] + 1j * state[:, 1]

    def step(h, token):
        x, at = token
        new = q * jnp.where(at[:, None, None] == 0, 0, h) + c.p * x[:, None]
        h = jnp.where(at[:, None, None] >= 0, new, h)
        return h, jnp.sum(g * new, 1).real + c.omega * x

    h, y = jax.lax.scan(step, h, (x.swapaxes(0, 1), positions.T))
    return y.swapaxes(0, 1), jnp.stack([h.real, h.imag], 1)


def fast(x, params, state, positions):
    return ops.cema(x, ops.coefficients(*params), state, positions=positions)


def loss_of(form):
    def loss(values, positions):
        y, state = form(*values, positions)
        y = jnp.where((positions >= 0)[..., None], y, 0)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state) * state), (y, state)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


FAST, LOOP = loss_of(fast), loss_of(loop)


def close(got, want, at=1e-12):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=at * max(1, np.abs(b).max()))


@pytest.mark.parametrize("name", POSITIONS)
def test_the_block_form_is_the_token_loop_in_values_and_gradients(name):
    values = (draw(B, T, D), stored(), draw(B, 2, N, D, seed=9))
    close(FAST(values, POSITIONS[name]), LOOP(values, POSITIONS[name]))


def test_the_block_form_gives_the_golden_vectors():
    shapes = ((2, 3, 1), (2, 3, 1), (2, 1, 1), (2, 1))
    alpha, delta, theta, omega = (
        waves(*shape, a=a)
        for shape, a in zip(shapes, (0.9, 1.1, 1.3, 0.8), strict=True)
    )
    gamma = jnp.stack([waves(2, 3, a=0.5), waves(2, 3, a=0.6)], -1)
    state = jnp.stack([waves(2, 3, a=0.4).T, waves(2, 3, a=0.3).T])[None]
    x, at = waves(1, 6, 2, a=0.7), 1 + jnp.arange(6)[None]
    params = (alpha, delta, theta, gamma, omega)
    y, after = jax.jit(fast)(x, params, state, at)
    want = [[1.55397286, -0.01602541], [1.81124933, 0.69998523]]
    close(y[0, (0, 5), :], jnp.asarray(want), 1e-8)
    re, im = [0.89641446, 0.60501307, 0.74374489], [0.02200416, 0.0201943, -0.26685822]
    close(after[0, :, :, 0], jnp.asarray([re, im]), 1e-8)
    fft = jax.jit(lambda x, p, s: ops.cema_fft(x, ops.coefficients(*p), s))
    close(fft(x, params, state), y)


def test_powers_of_any_count_are_powers():
    q = 0.9 * jnp.exp(1j * jnp.arange(3.0))
    for count in (1, 2, 5, 8):
        re, im = jax.jit(ops.powers_of, static_argnums=2)(q.real, q.imag, count)
        close(re + 1j * im, q[:, None] ** jnp.arange(count + 1))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_orders(monkeypatch):
    monkeypatch.setattr(ops, "BLOCK", 32)
    width, order = 16, 16
    shapes = ((width, order, 1), (width, order, 1), (width, 1, 1), (width, order, 2))
    params = tuple(jnp.zeros(s, jnp.float32) for s in (*shapes, (width, 1)))
    state = jnp.zeros((1, 2, order, width), jnp.float32)

    def temporary(length):
        at = jnp.zeros((1, length), jnp.int32)
        slope = jax.grad(lambda *v: jnp.sum(fast(*v, at)[0]), (0, 1, 2))
        x = jnp.zeros((1, length, width), jnp.float32)
        made = jax.jit(slope).lower(x, params, state).compile()
        return made.memory_analysis().temp_size_in_bytes / x.nbytes

    # All states at once would be 32 times x, several times over.
    assert temporary(2048) < 32


def reference_norm(x, positions):
    """Population moments over every feature so far."""
    out = np.zeros(x.shape)
    for b, t in np.ndindex(*positions.shape):
        if positions[b, t] < 0:
            continue
        own = [
            s
            for s in range(t + 1)
            if positions[b, s] >= 0 and not (positions[b, s + 1 : t + 1] == 0).any()
        ]
        past = np.asarray(x)[b, own].reshape(len(own), G, -1)
        mean = past.mean((0, 2))[:, None]
        std = np.sqrt(((past - mean) ** 2).mean((0, 2)) + 1e-5)[:, None]
        out[b, t] = ((past[-1] - mean) / std).reshape(-1)
    return out


@jax.jit
def normed(x, state, positions):
    zeros = jnp.zeros(D)
    return norms.timestep_norm(x, zeros, zeros, state, positions=positions, eps=1e-5)


FRESH = [name for name in POSITIONS if name not in ("plain", "right padding")]


@pytest.mark.parametrize("name", FRESH)
def test_the_norm_is_that_of_all_features_so_far_for_any_split(name):
    positions, x = POSITIONS[name], 3 + 2 * draw(B, T, D)
    start = norms.none_seen(B, G, jnp.float64)
    whole, behind = normed(x, start, positions)
    close(whole, reference_norm(x, np.asarray(positions)))
    for sizes in ((3, 17, 17), (1,) * T):
        state, at, parts = start, 0, []
        for size in sizes:
            cut = slice(at, at + size)
            y, state = normed(x[:, cut], state, positions[:, cut])
            parts.append(y)
            at += size
        close(jnp.concatenate(parts, 1), whole)
        close(state, behind)


def test_the_norm_gives_the_golden_vectors():
    open_level = norms.Moments(
        jnp.full(1, 3, jnp.int32), waves(1, 2, a=0.9), 1 + waves(1, 2, a=0.4) ** 2
    )
    state = norms.none_seen(1, 2, jnp.float64)._replace(open=open_level)
    zeros = jnp.zeros(6)
    y, after = norms.timestep_norm(
        2 * waves(1, 6, 6, a=0.7) + 1, zeros, zeros, state,
        positions=3 + jnp.arange(6)[None], eps=1e-5,
    )  # fmt: skip
    first = [0.83294474, 1.38193212, 1.18526707, 0.69789262, -0.44503978, -1.31301225]
    last = [0.4949985, -0.54636158, -1.30331085, -1.43522996, -0.87293402, 0.10043332]
    close(y[0, (0, 5), :], jnp.asarray([first, last]), 1e-8)
    seen = norms.merge(after.closed, after.open)
    assert int(seen.count[0]) == 9
    close(seen.mean[0], jnp.asarray([0.92326396, 0.99851282]), 1e-8)
    close(seen.var[0], jnp.asarray([1.72878102, 1.83105829]), 1e-8)


@pytest.mark.slow
def test_gradients_of_the_norm_are_those_of_the_token_loop(monkeypatch):
    positions, x = POSITIONS["packed"], 3 + 2 * draw(B, T, D)
    _, state = normed(draw(B, 8, D, seed=5), norms.none_seen(B, G, jnp.float64),
                      rows(AT[:8], AT[:8]))  # fmt: skip
    moments = tuple((level.mean, level.var) for level in state)

    def loss(x, moments, positions):
        levels = (
            level._replace(mean=m, var=v)
            for level, (m, v) in zip(state, moments, strict=True)
        )
        zeros = jnp.zeros(D)
        before = norms.NormState(*levels)
        y, after = norms.timestep_norm(
            x, zeros, zeros, before, positions=positions, eps=1e-5
        )
        leaves = [m for level in after for m in (level.mean, level.var)]
        return jnp.sum(jnp.sin(y)) + sum(jnp.sum(jnp.cos(m) * m) for m in leaves)

    blocks = jax.grad(loss, (0, 1))(x, moments, positions + 1)
    reset = jax.grad(loss, (0, 1))(x, moments, positions)
    monkeypatch.setattr(norms, "SHORT", T)
    close(blocks, jax.grad(loss, (0, 1))(x, moments, positions + 1))
    close(reset, jax.grad(loss, (0, 1))(x, moments, positions))


@pytest.mark.slow
def test_float32_variances_stay_exact_over_a_million_single_steps(monkeypatch):
    monkeypatch.setattr(norms, "OPEN", 256)
    monkeypatch.setattr(norms, "SHORT", 32)
    count = 1 << 20

    def step(state, i):
        x = 5 + jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (1, 1, 4))
        x = x.astype(jnp.float32)
        zeros = jnp.zeros(4, jnp.float32)
        at = jnp.full((1, 1), i, jnp.int32)
        _, state = norms.timestep_norm(x, zeros, zeros, state, positions=at, eps=1e-5)
        return state, jnp.stack([jnp.mean(wide := x.astype(float)), jnp.mean(wide**2)])

    run = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(count)))
    state, moments = run(norms.none_seen(1, 1))
    mean, square = np.asarray(moments).mean(0)
    seen = norms.merge(state.closed, state.open)
    assert int(seen.count[0]) == count
    np.testing.assert_allclose(seen.mean[0, 0], mean, rtol=2e-6)
    np.testing.assert_allclose(seen.var[0, 0], square - mean**2, rtol=4e-6)
