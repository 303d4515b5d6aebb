"""NEON (Advanced SIMD) of 64-bit Armv8-A: 128-bit vectors, 32 registers, multiply-add by lane.

A76 cores compute two vectors per cycle, the A53 and A72 one. There loads and latency bind less than
assumed; the tiles chosen reach that peak all the same.
"""

from graphopt.backends.isa.base import Isa

NEON = Isa("NEON", 16, 32, fma=True, load_operand=False, lane_operand=True, block=8)
