"""SSE4.2: x86-64-v2, 128-bit vectors, no fused multiply-add."""

from graphopt.backends.isa.base import Isa

SSE42 = Isa("SSE4.2", 16, 16, fma=False, load_operand=True, lane_operand=False, block=8)
