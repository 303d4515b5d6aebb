"""AVX2 with FMA: x86-64-v3, 256-bit vectors."""

from graphopt.backends.isa.base import Isa

# LLVM lets the result take the register of whichever operand is used last here. In tiles of one
# vector that is the broadcast input: sums then move from register to register, and are spilled.
_MULTIPLY_ADD = """
define <8 x float> @multiply_add(<8 x float> %a, <8 x float> %b, <8 x float> %sum) {
  %result = call <8 x float> asm "vfmadd231ps $2, $1, $0", "=x,x,x,0"(
      <8 x float> %a, <8 x float> %b, <8 x float> %sum)
  ret <8 x float> %result
}
"""

AVX2 = Isa("AVX2", 32, 16, fma=True, load_operand=True, lane_operand=False, block=8,
            fence="llvm.x86.avx.vzeroupper", multiply_add=_MULTIPLY_ADD)  # fmt: skip
