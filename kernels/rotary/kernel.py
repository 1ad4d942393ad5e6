"""Rotary positions in Triton. x is [tokens, heads, 2 * HALF], contiguous; cos and sin are [tokens, HALF] in fp32.

Design choices:
- Heads are turned where the projection left them, queries and keys in one launch, past the values between them.
- Cosines and sines are read, not computed: they are the same for all layers, and a sine in Triton that is right at
  large angles spills. They weigh a fortieth of the
  queries and keys of 32 heads with 8 for keys.
- The gradient is written to a tensor of its own, for whoever else holds what came in must not see it change.
"""

import triton
import triton.language as tl


@triton.jit
def rotate(
    x, y, cos, sin, heads,
    GROUP: tl.constexpr, ROTATED: tl.constexpr, HALF: tl.constexpr, BACKWARD: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """HEADS heads of a token, from x to y; forward x is y. BLOCK: the power of 2 from HALF on.

    Of every GROUP heads the first ROTATED are turned. BACKWARD: the other way round, and the others are copied.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, BLOCK)
    turned = (head % GROUP < ROTATED)[:, None]
    inside = (head < heads)[:, None] & (pair < HALF)[None, :]
    if not BACKWARD:
        inside = inside & turned
    place = (token * heads + head)[:, None] * (2 * HALF) + pair[None, :]
    first = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + place + HALF, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * HALF + pair, mask=pair < HALF, other=0.0)[None, :]
    s = tl.load(sin + token * HALF + pair, mask=pair < HALF, other=0.0)[None, :]
    if BACKWARD:
        s = -s
    turned_first = tl.where(turned, first * c - second * s, first)
    turned_second = tl.where(turned, second * c + first * s, second)
    tl.store(y + place, turned_first.to(y.dtype.element_ty), mask=inside)
    tl.store(y + place + HALF, turned_second.to(y.dtype.element_ty), mask=inside)
