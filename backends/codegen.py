"""PrimFuncs → one object file of plain C functions, through TVM's LLVM.

TVM's own pipeline wraps functions for its runtime; graphopt's kernels take raw pointers and a range
of tasks, so only the passes that lower their bodies run, and the object needs no TVM library.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from graphopt.backends.target import Target
from graphopt.ops.math import dtype_of
from graphopt.program.ir import Program


def llvm_target(target: Target) -> Any:
    """TVM's description of the target: only features it names are used."""
    return tvm.target.Target(
        {
            "kind": "llvm",
            "mtriple": target.triple,
            "mcpu": target.model or target.mcpu,
            "mattr": [f"+{feature}" for feature in target.features],
            "cl-opt": list(target.llvm_options),
        }
    )


def _lowering() -> Any:
    passes = [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.StmtSimplify(),
        tirx.transform.prim_func_pass(_with_serial_guards, opt_level=0),
        tirx.transform.prim_func_pass(_with_common_lanes, opt_level=0),
        tirx.transform.FlattenBuffer(),
        tirx.transform.NarrowDataType(32),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.UnrollLoop(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.LowerIntrin(),
    ]
    return tvm.ir.transform.Sequential(passes)


def _with_serial_guards(func: Any, *_: Any) -> Any:
    """Make vectorized loops serial in which VectorizeLoop would tear a binding from its readers.

    It gives a statement with a guard (`if_then_else`) that differs from lane to lane a serial loop
    of its own. If that is a binding, whoever reads it behind that loop sees the last lane's value
    in all lanes; if it is a store, it finds no binding that was made before that loop.
    """

    def serialize(loop: Any) -> Any:
        if loop.kind != tirx.ForKind.VECTORIZED or not _guards_bound(loop):
            return loop
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)

    body = tvm_ffi.structural_map(func.body, [(tirx.For, serialize)], order="pre")
    return func.with_body(body)


def _guards_bound(loop: Any) -> bool:
    """Whether the loop, under a guard that may differ from lane to lane, binds a value or stores
    one in a statement that reads such a value."""
    lanes = [loop.loop_var]
    found: list[Any] = []

    def reads(expression: Any, variables: list[Any]) -> bool:
        seen: list[Any] = []
        tvm_ffi.structural_walk(expression, (tirx.Var, seen.append))
        return any(var.same_as(each) for var in seen for each in variables)

    def guard(call: Any) -> None:
        if getattr(call.op, "name", "").endswith(".if_then_else") and reads(call.args[0], lanes):
            found.append(call)

    def bind(each: Any) -> None:
        if reads(each.value, lanes):
            lanes.append(each.var)
            tvm_ffi.structural_walk(each.value, (tvm.ir.Call, guard))

    def store(each: Any) -> None:
        if any(reads(part, lanes[1:]) for part in (each.value, *each.indices)):
            tvm_ffi.structural_walk(each.value, (tvm.ir.Call, guard))

    tvm_ffi.structural_walk(loop.body, [(tirx.Bind, bind), (tirx.BufferStore, store)])
    return bool(found)


def _with_common_lanes(func: Any, *_: Any) -> Any:
    """Let all vectorized loops of so many lanes use one variable; they do not nest.

    FlattenBuffer simplifies each index with all loop variables there have been in the function. A
    kernel with a thousand vectorized statements took a second and more.
    """
    common: dict[int, Any] = {}
    lanes: dict[Any, Any] = {}

    def rename(loop: Any) -> Any:
        if loop.kind != tirx.ForKind.VECTORIZED:
            return loop
        variable = common.setdefault(int(loop.extent), loop.loop_var)
        lanes[loop.loop_var] = variable
        return tirx.For(variable, loop.min, loop.extent, loop.kind, loop.body)

    def replace(var: Any) -> Any:
        return lanes.get(var, var)

    body = tvm_ffi.structural_map(func.body, [(tirx.For, rename), (tirx.Var, replace)], order="pre")
    return func.with_body(body)


def _bindings_to_memory(func: Any) -> Any:
    """Let every bound float or vector live in a local buffer of one element.

    TVM's LLVM generator hands each binding to its simplifier, which puts the values into one
    another again and again: a chain of two transcendental functions took most of a minute.
    LLVM turns the buffers back into registers.
    """
    homes: dict[Any, Any] = {}

    def collect(bind: Any) -> None:
        dtype = dtype_of(bind.var)
        if "x" in dtype or dtype.startswith("float"):
            homes[bind.var] = tirx.decl_buffer((1,), dtype, bind.var.name, scope="local")

    def store(bind: Any) -> Any:
        home = homes.get(bind.var)
        return bind if home is None else tirx.BufferStore(home, bind.value, [0])

    def load(var: Any) -> Any:
        home = homes.get(var)
        return var if home is None else home[0]

    tvm_ffi.structural_walk(func.body, (tirx.Bind, collect))
    if not homes:
        return func
    body = tvm_ffi.structural_map(func.body, [(tirx.Bind, store), (tirx.Var, load)], order="pre")
    allocations = [tirx.AllocBuffer(home) for home in homes.values()]
    return func.with_body(tirx.SeqStmt([*allocations, body]))


def _with_code(func: Any, code: str) -> Any:
    """The function where it may call those that `code`, in LLVM's language, defines.

    They are inlined, and no symbol is left of them.
    """
    if not code:
        return func
    zero = tirx.const(0, "int32")
    return func.with_body(tirx.AttrStmt(zero, "pragma_import_llvm", code, func.body))


def build_module(program: Program, target: Target) -> Any:
    """Compile every kernel of the program; gives TVM's module (its source can be inspected)."""
    description = llvm_target(target)
    functions = {}
    for kernel in {step.kernel.symbol: step.kernel for step in program.steps}.values():
        symbol = f"{program.name}_k_{kernel.symbol}"
        functions[symbol] = kernel.prim_func.with_attr(
            {"global_symbol": symbol, "target": description}
        )
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        module = _lowering()(tvm.IRModule(functions))
    module = tvm.IRModule(
        {
            name: _with_code(_bindings_to_memory(func), target.isa.multiply_add)
            for name, func in module.functions.items()
        }
    )
    return tvm.get_global_func("target.build.llvm")(module, description)


def compile_kernels(program: Program, target: Target) -> bytes:
    """The object file with every kernel of the program."""
    if not program.steps:
        return b""
    module = build_module(program, target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.o"
        module.write_to_file(str(path), "o")
        return path.read_bytes()


def assembly(program: Program, target: Target, kinds: Sequence[str] = ("asm",)) -> str:
    """The assembly (or, with `ll`, the LLVM IR) of all kernels, for people who read it."""
    module = build_module(program, target)
    return "\n".join(str(module.inspect_source(kind)) for kind in kinds)
