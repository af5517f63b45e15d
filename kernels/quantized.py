"""Quantized: the keys and values of one attention, prepared for the low-precision kernels."""

import math
from dataclasses import dataclass

from torch import Tensor

MAX_SAMPLE = 1024  # tokens that the means are taken over, at most
MIN_SCALE = 2.0**-50  # keeps the scale of a block of zeros, and all that is divided by it, finite
PEAK_EXPONENT = 8  # the largest weight of a row lies in (2^7, 2^8]; e4m3 ends at 448


@dataclass(frozen=True, eq=False, kw_only=True)
class Quantized:
    """Smoothed keys and values, one slab of T token slots per kv block, empty slots 0.

    T is kv_block_size rounded up to a power of two, at least 32. A token's key is
    k * k_scale + k_mean and its value v * 2^v_exponent + v_mean; both means are over a sample.

    Args:
        k: int8 or float8_e4m3fn, [B, H, Nk, T, D].
        k_scale: fp32 [B, H, Nk].
        k_mean: fp32 [B, H, D].
        v: float8_e4m3fn [B, H, Nk, D, T] with its tokens in `slot_order`, or the values as they
            came, [B, H, S, D]; then v_exponent and v_mean are 0.
        v_exponent: fp32 [B, H, Nk], whole numbers.
        v_mean: fp32 [B, H, D].
        num_tokens: S.
    """

    k: Tensor
    k_scale: Tensor
    k_mean: Tensor
    v: Tensor
    v_exponent: Tensor
    v_mean: Tensor
    num_tokens: int


def sample_step(num_tokens: int) -> int:
    """Return a step that visits every token once, modulo num_tokens, and soon spreads evenly.

    A fixed stride would keep meeting the same columns of a frame.
    """
    if num_tokens <= MAX_SAMPLE:
        return 1
    step = int(num_tokens * 0.6180339887)
    while math.gcd(step, num_tokens) != 1:
        step += 1
    return step


def slot_order(v: Tensor) -> Tensor:
    """Reorder the last dimension, token slots, within every 16: 8b + 2t + a goes to 4t + 2b + a.

    A thread of wgmma then holds the weights of four neighbouring slots, as the second product's
    operand wants them, so that the weights never move between threads.
    """
    return v.unflatten(-1, (-1, 2, 4, 2)).transpose(-2, -3).flatten(-4)
