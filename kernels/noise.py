"""Addressable normals in registers: csrc/core/philox.h and normal.h, operation by operation.

The bits are those of every other backend: integer operations, conversions and roots that round to
nearest, explicit fused multiply-adds, and no product that feeds an addition. Kernels that use them
are launched with ``enable_fp_fusion=False`` (launch.OPTIONS), so that nothing else is contracted.
Triton's interpreter has no fused multiply-add: there a few units in the last place differ.
"""

import triton
import triton.language as tl


@triton.jit
def philox4x32_10(c0, c1, c2, c3, k0, k1):
    """Four random words of a counter under a key, all uint32 (Salmon et al. 2011, section 3.3)."""
    for _ in tl.static_range(10):
        # One wide product for both halves: 3 instructions an element fewer than umulhi and *.
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def minus_two_log_uniform(w):
    """-2 ln((w + 1/2) 2^-32)."""
    signed = w.to(tl.int32, bitcast=True)
    low = signed > -1
    v = tl.where(low, signed, ~signed)  # the smaller of w and ~w
    u = tl.fma(v.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)  # 2^-32, 2^-33
    t = tl.where(low, u, 1.0 - u)

    # t = 2^k f with f in [sqrt(1/2), sqrt(2)); k stays where it lies in the exponent's bits.
    k = (t.to(tl.uint32, bitcast=True) - 0x3F3504F3) & 0xFF800000
    f = (t.to(tl.uint32, bitcast=True) - k).to(tl.float32, bitcast=True)
    s = tl.where(k == 0, -u, f - 1.0)  # near U = 1 the rounding of t would cost 5e-5

    q = tl.fma(0.20476099848747253, s, -0.32692602276802063)
    q = tl.fma(q, s, 0.3450794517993927)
    q = tl.fma(q, s, -0.397674024105072)
    q = tl.fma(q, s, 0.49937206506729126)
    q = tl.fma(q, s, -0.6667107343673706)
    q = tl.fma(q, s, 1.0000075101852417)
    minus_two_log_f = tl.fma(q, s * s, -2.0 * s)
    exponent = k.to(tl.int32, bitcast=True).to(tl.float32)  # 2^23 k
    return tl.fma(exponent, -1.6525916635146132e-07, minus_two_log_f)  # -2 ln 2 / 2^23


@triton.jit
def box_muller(w_even, w_odd):
    """(r cos theta, r sin theta) with r = sqrt(-2 ln U(w_even)), theta = 2 pi w_odd 2^-32."""
    r = tl.sqrt_rn(minus_two_log_uniform(w_even))

    # y in [-1/2, 1/2]: the angle from the nearest quarter turn, in quarter turns.
    y = (w_odd << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    y2 = y * y
    sin_y = tl.fma(-0.004592289216816425, y2, 0.07967590540647507)
    sin_y = tl.fma(sin_y, y2, -0.6459629535675049)
    sin_y = tl.fma(sin_y, y2, -6.542083497151907e-08)
    sin_y = tl.fma(y, 1.5707963705062866, y * sin_y)
    cos_y = tl.fma(0.0009040216682478786, y2, -0.02086028829216957)
    cos_y = tl.fma(cos_y, y2, 0.25366923213005066)
    cos_y = tl.fma(cos_y, y2, -1.2337005138397217)
    cos_y = tl.fma(cos_y, y2, 1.0)

    # The quadrant: bit 31 of `turn` says a half turn, bit 30 a quarter more.
    turn = w_odd + 0x20000000
    radius = (r.to(tl.uint32, bitcast=True) ^ (turn & 0x80000000)).to(tl.float32, bitcast=True)
    quarter = (turn & 0x40000000) != 0
    return radius * tl.where(quarter, -sin_y, cos_y), radius * tl.where(quarter, cos_y, sin_y)


@triton.jit
def normals(blocks, draw, sample, seed):
    """The four normals of each Philox block: elements 4 * block .. 4 * block + 3 of a sample.

    blocks: uint32 [LANES]; draw: uint32, stream << 24 | index; sample, seed: int64.
    """
    w0, w1, w2, w3 = philox4x32_10(
        blocks,
        draw,
        sample.to(tl.uint32),
        (sample >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return z0, z1, z2, z3
