"""Three pieces that numba lacks: a cache prefetch, reading bfloat16, and an exponential that vectorises."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

# Sums may be reordered so that they vectorise; -inf and NaN keep their meaning, unlike under fastmath=True.
ORDER_FREE = {"reassoc", "contract", "arcp", "nsz"}


@intrinsic
def prefetch(typingctx: Any, array: Any, head: Any, position: Any, element: Any) -> Any:
    """Ask for the cache line of array[head, position, element].

    Selected runs are short, so the processor's own prefetcher starts too late on each of them; asking one tile ahead
    halves the time of the whole loop.
    """
    signature = types.void(array, head, position, element)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array_type = signature.args[0]
        value = context.make_array(array_type)(context, builder, args[0])
        index = [context.cast(builder, a, t, types.intp) for a, t in zip(args[1:], signature.args[1:], strict=True)]
        pointer = cgutils.get_item_pointer(context, builder, array_type, value, index, wraparound=False)
        byte_pointer, int32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [byte_pointer, int32, int32, int32])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        read, to_second_level, data = int32(0), int32(2), int32(1)
        builder.call(function, [builder.bitcast(pointer, byte_pointer), read, to_second_level, data])
        return context.get_dummy_value()

    return signature, codegen


def widen(value):  # type: ignore[no-untyped-def]
    """float32 from a float32, an int8, or the 16 raw bits of a bfloat16 (numpy has no such type)."""
    raise NotImplementedError


@overload(widen, inline="always")
def _widen(value):  # type: ignore[no-untyped-def]
    if value == types.int8:
        return lambda value: np.float32(value)
    if isinstance(value, types.Integer):
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


@njit(cache=True, nogil=True, fastmath=ORDER_FREE, error_model="numpy")
def exp_in_place(x, count):  # type: ignore[no-untyped-def]
    """x[i] = exp(x[i]) for i < count and x <= 0, within 2e-7 relative; 0 below -87, where float32 runs out.

    exp(v) = 2^n exp(r) with |r| <= ln(2) / 2. The Taylor series of degree 7 errs by less than 1e-8 there; libm's own
    exp is a call per element and cannot vectorise.
    """
    for i in range(count):
        v = max(x[i], np.float32(-88.0))
        n = np.floor(v * np.float32(1.44269504) + np.float32(0.5))
        r = v - n * np.float32(0.693359375)
        r = r + n * np.float32(2.12194440e-4)
        p = np.float32(1.0 / 5040.0)
        p = p * r + np.float32(1.0 / 720.0)
        p = p * r + np.float32(1.0 / 120.0)
        p = p * r + np.float32(1.0 / 24.0)
        p = p * r + np.float32(1.0 / 6.0)
        p = p * r + np.float32(0.5)
        p = p * r + np.float32(1.0)
        p = p * r + np.float32(1.0)
        power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
        x[i] = p * power if v > np.float32(-87.0) else np.float32(0.0)
