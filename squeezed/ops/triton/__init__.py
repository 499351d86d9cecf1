"""Triton versions of the four operations; `squeezed.ops.reference` defines what they compute."""

from squeezed.ops.triton.chain import attend_fixed
from squeezed.ops.triton.cost import AttentionShape, dense_is_faster
from squeezed.ops.triton.merge import merge_attention

__all__ = [
    "AttentionShape",
    "attend_fixed",
    "dense_is_faster",
    "merge_attention",
]
