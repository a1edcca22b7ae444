"""Selective scans of TPU and GPU, interpreted, against the form in plain XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm.errors import LclmError
from lclm.ops.scan import selective_scan
from pallas_kernels import dispatch, tuning
from pallas_kernels.selective_scan import BEST, gpu, kernel, shared, tpu

B, T, N = 2, 29, 8
CHANNELS = {"interpret": tpu.CHANNELS, "interpret_gpu": gpu.CHANNELS}
# A document that goes on, one that begins inside the row, and padding behind both.
POSITIONS = np.stack(
    [np.arange(5, 5 + T), np.r_[np.arange(11), np.arange(12), np.full(6, -1)]]
).astype(np.int32)


@pytest.fixture
def short_blocks():
    with (
        tuning.using("scan_tpu", forward=16, backward=8, unrolled=1, unrolled_back=1),
        tuning.using("scan_gpu", block=8, unrolled=2),
    ):
        yield


RUNS = [("interpret", 1), ("interpret_gpu", 1), ("interpret_gpu", 3)]


@pytest.fixture
def parts(request, monkeypatch):
    """Rows of the GPU's kernel whole, and cut into parts of 10, 10 and 9 tokens."""
    runs = gpu._run_forward, gpu._run_backward
    cut = shared.in_parts(*runs, lambda sizes, shape: request.param)
    monkeypatch.setattr(gpu, "scan", shared.operation(*cut))


def inputs(C):
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    return (draw(B, T, C), draw(B, T, C), -jnp.exp(draw(N, C)), draw(B, T, N),
            draw(B, T, N), draw(B, N, C))  # fmt: skip


def run(implementation):
    def call(x, raw, a, b, c, state):
        y, end = selective_scan(
            x, raw, a=a, b=b, c=c, positions=jnp.asarray(POSITIONS), state=state,
            implementation=implementation,
        )  # fmt: skip
        return jnp.where(POSITIONS[..., None] >= 0, y, 0), end

    return call


@pytest.mark.parametrize(("name", "parts"), RUNS, indirect=["parts"])
def test_a_kernel_gives_outputs_and_state_of_the_recurrence(name, short_blocks, parts):
    args = inputs(CHANNELS[name])
    for got, want in zip(run(name)(*args), run("xla")(*args), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parts"), RUNS, indirect=["parts"])
def test_a_kernel_gives_every_gradient_of_the_recurrence(name, short_blocks, parts):
    args = inputs(CHANNELS[name])

    def weighed(call):
        def total(*args):
            y, end = call(*args)
            return jnp.sum(y * jnp.cos(jnp.arange(y.shape[2]))) + jnp.sum(end**2)

        return jax.grad(total, range(6))

    got, want = weighed(run(name))(*args), weighed(run("xla"))(*args)
    for part, a, b in zip("x raw a b c state".split(), got, want, strict=True):
        error = jnp.linalg.norm(a - b) / jnp.linalg.norm(b)
        assert error < 3e-6, part


@pytest.mark.parametrize(("platform", "name"), sorted(BEST.items()))
@pytest.mark.parametrize(
    ("shape", "states", "dtype", "told"),
    [
        ((1, 8, 1000), 16, jnp.float32, "1000 channels"),
        ((1, 8, 1024), 12, jnp.float32, "12 states"),
        ((1, 8, 1024), 16, jnp.float64, "float64"),
    ],
)
def test_what_a_kernel_cannot_take_it_refuses_by_name_and_leaves_to_xla(
    platform, name, shape, states, dtype, told
):
    with pytest.raises(ValueError, match=told):
        kernel(shape, states, dtype, name)
    with dispatch.target(platform):
        assert kernel(shape, states, dtype, None) is None


@pytest.mark.parametrize("platform", BEST)
def test_an_accelerator_runs_its_kernel_and_a_processor_none(platform):
    shape = (1, 8, 1024)
    assert kernel(shape, 16, jnp.float32, None) is None
    with dispatch.target(platform):
        assert kernel(shape, 16, jnp.float32, None) is not None
        assert kernel(shape, 16, jnp.float32, "xla") is None


@pytest.mark.parametrize(
    ("shape", "parts"),
    [((1, 32768, 1536), 16), ((1, 32768, 8192), 1), ((4, 32768, 8192), 1),
     ((1, 1200, 64), 4), ((1, 300, 64), 1), ((1, 1 << 20, 64), 64)],
)  # fmt: skip
def test_rows_too_few_to_fill_a_gpu_are_cut(shape, parts):
    assert gpu._parts(tuning.of("scan_gpu"), shape) == parts


def test_a_name_that_is_not_known_is_an_error():
    with pytest.raises(LclmError, match="known are"):
        run("cuda")(*inputs(64))
