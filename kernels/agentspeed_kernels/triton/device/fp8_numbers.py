"""Numbers in e4m3, two in 16 bits as a row of a cache has them, to and from what matrix instructions take.

The bits of an e4m3 number, sign first and the others four places from the end, are a bfloat16 number 2^120 times as
small: exactly, subnormal ones included, and finite for every byte. So no number is converted: bits are moved, of four
numbers by six instructions. Whoever multiplies gives half of the power to what is multiplied and half to the product
(`HALF_POWER`), so that nothing leaves the range of float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

HALF_POWER = tl.constexpr(1152921504606846976.0)
"""2^60."""
MOST = tl.constexpr(448.0)
"""The largest number of e4m3."""
PAIRS_ASM = tl.constexpr(
    """
    {
    .reg .b32 signed;
    prmt.b32 signed, $2, 0, 0xa280;
    shl.b32 signed, signed, 4;
    and.b32 $0, signed, 0x87f087f0;
    prmt.b32 signed, $2, 0, 0xb391;
    shl.b32 signed, signed, 4;
    and.b32 $1, signed, 0x87f087f0;
    }
    """
)
PAIRS_REGISTERS = tl.constexpr("=r,=r,r")
"""`pairs` of two of x at once in NVIDIA's instructions, which compilers do not find: a byte with its sign in front is
moved by four places, and the sign and seven bits stay. Gluon's kernels take it too."""


@triton.jit
def pairs(x, ASM: tl.constexpr):
    """(Numbers in the low bytes, those in the high bytes) of int16 x as bfloat16, 2^120 times as small.

    ASM: in NVIDIA's instructions."""
    if ASM:
        return tl.inline_asm_elementwise(
            PAIRS_ASM,
            PAIRS_REGISTERS,
            [x],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    low = ((x << 8) & -32768) | ((x << 4) & 0x07F0)
    high = (x & -32768) | ((x >> 4) & 0x07F0)
    return low.to(tl.bfloat16, bitcast=True), high.to(tl.bfloat16, bitcast=True)


@triton.jit
def sizes(value):
    """Magnitudes of float32 numbers; infinite where there is no number, which a maximum would pass over."""
    size = tl.abs(value)
    return tl.where(size < float("inf"), size, float("inf"))


@triton.jit
def scale_of(largest):
    """The scale of numbers of which this is the largest of `sizes`, as `fp8_cache.CacheRow.coded` defines it."""
    by = tl.div_rn(largest, MOST)
    return tl.where(largest < float("inf"), tl.where(by >= 1.1754944e-38, by, 1.0), float("nan"))


@triton.jit
def coded(value, inverse):
    """uint8: the nearest e4m3 numbers of float32 `value * inverse`, ties to even; zero where that is no number."""
    held = value * inverse
    size = tl.minimum(tl.abs(held), MOST)
    bits = size.to(tl.int32, bitcast=True)
    # Of normal numbers three places of the fraction stay, and the exponent loses 120; others are multiples of 2^-9,
    # which the sum with 1.5 * 2^23 has as its last places.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (size * 512.0 + 12582912.0).to(tl.int32, bitcast=True) & 0xF
    nearest = tl.where(size < 0.015625, small, normal)
    sign = (held.to(tl.int32, bitcast=True) >> 24) & 0x80
    return tl.where(held == held, nearest | sign, 0).to(tl.uint8)


@triton.jit
def decoded(byte):
    """float32 of e4m3 numbers in uint8."""
    bits = byte.to(tl.int32)
    found = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
    return found.to(tl.float32, bitcast=True) * HALF_POWER * HALF_POWER
