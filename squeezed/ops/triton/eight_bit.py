"""Read rows in 8 bits: nothing is undone key by key.

The key scales multiply the query, the key centre adds one number to every logit of a row (to the log-sum-exp, then),
the value scales and centre apply once to the output. See `squeezed.storage` for how rows get there.
"""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

# Scaled queries are multiplied in float16, whose small numbers lose bits: lift them by a power of two.
LIFT = tl.constexpr(16.0)


@triton.jit
def unpack(word, FAST: tl.constexpr):
    """The four int8 of an int32 as float32, lowest byte first. FAST: in PTX; the interpreter knows none.

    Conversion is slow on the device; placing the biased byte in the mantissa of 2^23 and subtracting is quick.
    """
    if FAST:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 biased;
            xor.b32 biased, $4, 0x80808080;
            prmt.b32 $0, biased, 0x4B000000, 0x7650;
            prmt.b32 $1, biased, 0x4B000000, 0x7651;
            prmt.b32 $2, biased, 0x4B000000, 0x7652;
            prmt.b32 $3, biased, 0x4B000000, 0x7653;
            sub.f32 $0, $0, 0f4B000080;
            sub.f32 $1, $1, 0f4B000080;
            sub.f32 $2, $2, 0f4B000080;
            sub.f32 $3, $3, 0f4B000080;
            }""",
            "=r,=r,=r,=r,r",
            [word],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        return (
            ((word << 24) >> 24).to(tl.float32),
            ((word << 16) >> 24).to(tl.float32),
            ((word << 8) >> 24).to(tl.float32),
            (word >> 24).to(tl.float32),
        )


@triton.jit
def unpack_rows(words, FAST: tl.constexpr):
    """Rows of int8, given as int32 [N, W], as float16 [N, 4 W] for the matrix units.

    Read as bytes, each would reach the matrix layout by a load of its own. The biased byte is placed in the mantissa of
    1024, two at a time.
    """
    if FAST:
        a, b, c, d = tl.inline_asm_elementwise(
            """{
            .reg .b32 biased, low, high, offset;
            mov.b32 offset, 0x64806480;
            xor.b32 biased, $4, 0x80808080;
            prmt.b32 low, biased, 0x64646464, 0x4140;
            prmt.b32 high, biased, 0x64646464, 0x4342;
            sub.f16x2 low, low, offset;
            sub.f16x2 high, high, offset;
            mov.b32 {$0, $1}, low;
            mov.b32 {$2, $3}, high;
            }""",
            "=h,=h,=h,=h,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
    else:
        a, b, c, d = unpack(words, FAST)
        a = a.to(tl.float16)
        b = b.to(tl.float16)
        c = c.to(tl.float16)
        d = d.to(tl.float16)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def packed_query(query, key_scale, key_centre, HEAD_DIM: tl.constexpr):
    """One query row, scaled for packed keys: channels 4 w + i for i = 0..3, [HEAD_DIM / 4] each; shift and |q|^2."""
    word = tl.arange(0, HEAD_DIM // 4) * 4
    q0 = tl.load(query + word).to(tl.float32)
    q1 = tl.load(query + word + 1).to(tl.float32)
    q2 = tl.load(query + word + 2).to(tl.float32)
    q3 = tl.load(query + word + 3).to(tl.float32)
    mean = q0 * tl.load(key_centre + word) + q1 * tl.load(key_centre + word + 1)
    mean += q2 * tl.load(key_centre + word + 2) + q3 * tl.load(key_centre + word + 3)
    norm = tl.sum(q0 * q0 + q1 * q1 + q2 * q2 + q3 * q3, axis=0)
    q0 *= tl.load(key_scale + word)
    q1 *= tl.load(key_scale + word + 1)
    q2 *= tl.load(key_scale + word + 2)
    q3 *= tl.load(key_scale + word + 3)
    return q0, q1, q2, q3, tl.sum(mean, axis=0), norm


@triton.jit
def packed_logits(words, q0, q1, q2, q3, FAST: tl.constexpr):
    """Products of packed keys, [N, HEAD_DIM / 4] int32, with a packed query: [N]."""
    k0, k1, k2, k3 = unpack(words, FAST)
    return tl.sum(k0 * q0[None, :] + k1 * q1[None, :] + k2 * q2[None, :] + k3 * q3[None, :], axis=1)


@triton.jit
def scaled_query(q, key_scale, key_centre, head, scale_log2, HEAD_DIM: tl.constexpr):
    """The query rows to multiply with stored keys, the scale of those logits, and what every logit of a row lacks."""
    dim = tl.arange(0, HEAD_DIM)
    if key_scale is None:
        shift = tl.zeros([q.shape[0]], tl.float32)
    else:
        full = q.to(tl.float32)
        shift = tl.sum(full * tl.load(key_centre + head * HEAD_DIM + dim)[None, :], axis=1) * scale_log2
        scaled = full * (tl.load(key_scale + head * HEAD_DIM + dim) * LIFT)[None, :]
        q = scaled if q.dtype == tl.float32 else scaled.to(tl.float16)
        scale_log2 = scale_log2 / LIFT
    return q, scale_log2, shift
