"""Triton versions of the four operations; `squeezed.ops.reference` defines what they compute."""

from squeezed.ops.triton.chain import attend_fixed, attend_with_own
from squeezed.ops.triton.cost import AttentionShape
from squeezed.ops.triton.merge import merge_attention
from squeezed.ops.triton.own import OwnKeys, Tally
from squeezed.ops.triton.peak import peak_weights

__all__ = [
    "AttentionShape",
    "OwnKeys",
    "Tally",
    "attend_fixed",
    "attend_with_own",
    "merge_attention",
    "peak_weights",
]
