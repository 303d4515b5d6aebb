"""What the kernel generators know about an instruction set: data only, one file for each."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Isa:
    """The vector side of an instruction set.

    Attributes:
        name: as people call it.
        vector_bytes: width of one vector register.
        registers: how many vector registers the code may use.
        fma: whether one instruction multiplies and adds.
        load_operand: whether arithmetic can take a vector operand straight from memory.
        lane_operand: whether a multiply-add can take one lane of a vector as its scalar operand.
        block: channels in one block of the `NCHWc` layout; a vector may hold several of them.
        fence: an LLVM intrinsic that no vector register keeps its value across; none if empty.
        multiply_adds: vectors that a core multiplies and adds per cycle.
        panel_bytes: weights that a deep product multiplies with all rows before the next ones; a
            third of them in Winograd's products, which share the cache with many inputs.
        multiply_add: `multiply_add(a, b, sum)` of one vector each in LLVM's language, whose result
            takes the register of `sum`; empty if LLVM may choose.
    """

    name: str
    vector_bytes: int
    registers: int
    fma: bool
    load_operand: bool
    lane_operand: bool
    block: int
    fence: str = ""
    multiply_adds: int = 2
    panel_bytes: int = 12288
    multiply_add: str = ""

    def lanes(self, dtype_bytes: int = 4) -> int:
        """Elements of `dtype_bytes` bytes in one vector register."""
        return self.vector_bytes // dtype_bytes

    @property
    def narrow(self) -> int:
        """Lanes that all else computes as one: a vector, or a block that is smaller."""
        return min(self.block, self.lanes())

    @property
    def wide(self) -> int:
        """Lanes that products compute as one: a block, or the blocks of a vector."""
        return max(self.block, self.lanes())

    def widened(self) -> Isa:
        """With blocks of whole vectors, for kernels whose operands are in no layout of blocks."""
        return replace(self, block=self.wide)
