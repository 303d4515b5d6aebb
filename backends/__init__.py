"""Programs to code: lowering, kernel generators, targets, LLVM, the C file and the linker."""
