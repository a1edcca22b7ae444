"""Attention of a few queries over a cache buffer; inference only."""

from pallas_kernels.decode.cached import (
    attention_and_sums,
    cached_attention,
    column_sums,
    in_order,
)
from pallas_kernels.decode.pages import (
    Selection,
    no_bounds,
    page_bounds,
    paged_attention,
    refresh_bounds,
    select_pages,
    upper_bounds,
)

__all__ = [
    "Selection",
    "attention_and_sums",
    "cached_attention",
    "column_sums",
    "in_order",
    "no_bounds",
    "page_bounds",
    "paged_attention",
    "refresh_bounds",
    "select_pages",
    "upper_bounds",
]
