"""The patterns of the table: causal masks from whole-number options."""

from collections.abc import Callable

from lclm.errors import LclmError
from pallas_kernels import mask as masks
from pallas_kernels.mask import Mask


def _mask(make: Callable[..., Mask], *sizes: int, **options: int) -> Mask:
    """A mask whose bad sizes are errors of ours."""
    try:
        return masks.causal() & make(*sizes, **options)
    except ValueError as error:
        raise LclmError(str(error)) from None


def causal() -> Mask:
    """Every earlier token and itself."""
    return masks.causal()


def window(window: int = 1024) -> Mask:
    """The last `window` tokens, itself included."""
    return _mask(masks.window, window)


def sink_window(sinks: int = 4, window: int = 1024) -> Mask:
    """The first `sinks` tokens and the last `window` (arXiv 2309.17453)."""
    return _mask(masks.window, window) | _mask(masks.sink, sinks)


def chunk(chunk: int = 2048) -> Mask:
    """Tokens of the query's own block of `chunk` (arXiv 2404.08801)."""
    return _mask(masks.chunk, chunk)


def shifted_groups(group: int = 2048) -> Mask:
    """S2-Attn without wrap-around (arXiv 2309.12307)."""
    return _mask(masks.group, group)


def block_sparse(
    block: int = 64, local: int = 16, stride: int = 8, kv_heads: int = 1
) -> Mask:
    """Near blocks and stripes that differ between kv heads (arXiv 2410.01485)."""
    return _mask(masks.block_sparse, block, local, stride, kv_heads=kv_heads)
