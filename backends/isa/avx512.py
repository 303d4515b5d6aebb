"""AVX-512 (F, BW, CD, DQ, VL): x86-64-v4, 512-bit vectors, twice the registers.

Zen 4 and Intel's cores for laptops and embedded boards compute one such vector per cycle, or two of
256 bits. Servers compute two; they are not what the choices are made for. So blocks of 8 channels,
half a vector, cost nothing where vectors are not for products, and waste less than 16.
"""

from graphopt.backends.isa.base import Isa

# Large register tiles take weights slowly enough for the second-level cache: panels of 12 KB, half
# of a small first level as for other instruction sets, were 2 % slower.
AVX512 = Isa(
    "AVX-512", 64, 32, fma=True, load_operand=True, lane_operand=False, block=8, multiply_adds=1,
    panel_bytes=98304,
)  # fmt: skip
