"""Attention of a few queries over a cache buffer; inference only."""

from pallas_kernels.decode.cached import cached_attention, column_sums

__all__ = ["cached_attention", "column_sums"]
