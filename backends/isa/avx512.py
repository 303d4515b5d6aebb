"""AVX-512 (F, BW, CD, DQ, VL): x86-64-v4, 512-bit vectors, twice the registers."""

from graphopt.backends.isa.base import Isa

AVX512 = Isa("AVX-512", 64, 32, fma=True, load_operand=True, lane_operand=False, block=16)
