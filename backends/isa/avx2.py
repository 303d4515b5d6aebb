"""AVX2 with FMA: x86-64-v3, 256-bit vectors."""

from graphopt.backends.isa.base import Isa

AVX2 = Isa("AVX2", 32, 16, fma=True, load_operand=True, lane_operand=False, block=8,
            fence="llvm.x86.avx.vzeroupper")  # fmt: skip
