"""Program → C: the header with the model's interface, and the file with its step table.

The C file holds no logic: one small function per step that looks up its buffers and calls the
kernel, the table of steps, what the CPU must have, and the weights (`.incbin`). The runtime in
`graphopt/runtime/csrc` does the rest.
"""

from __future__ import annotations

import json
import keyword
import math
import re
import sys
from collections.abc import Mapping
from importlib import resources

import numpy as np

from graphopt.backends.cpu_features import probes
from graphopt.backends.target import Target
from graphopt.errors import GraphoptError
from graphopt.program.ir import ALIGNMENT, Buffer, Program, Step

WEIGHTS_FILE = "weights.bin"
MAX_THREADS = 128  # GRAPHOPT_MAX_THREADS in csrc/graphopt_api.h

# numpy name → C type in the header.
C_TYPES: Mapping[str, str] = {
    "bool": "uint8_t",
    "int8": "int8_t",
    "uint8": "uint8_t",
    "int16": "int16_t",
    "uint16": "uint16_t",
    "int32": "int32_t",
    "uint32": "uint32_t",
    "int64": "int64_t",
    "uint64": "uint64_t",
    "float16": "uint16_t",
    "float32": "float",
    "float64": "double",
}

# C and C++ keywords, and words whose functions (`pthread_create`, …) a model of that
# name would redefine.
_RESERVED = frozenset({
    "auto", "break", "case", "char", "class", "const", "continue", "default", "delete", "do",
    "double", "else", "enum", "extern", "float", "for", "goto", "if", "inline", "int", "long",
    "main", "namespace", "new", "register", "restrict", "return", "short", "signed", "sizeof",
    "static", "struct", "switch", "template", "this", "typedef", "union", "unsigned", "void",
    "volatile", "while",
    "cnd", "graphopt", "mtx", "pthread", "sem", "thrd", "timer", "tss",
})  # fmt: skip
# `<name>.py` beside a program would take these modules' place, for the loader itself too.
_PYTHON_MODULES = (sys.stdlib_module_names | {"numpy"}) - {"test"}


def kernel_symbol(program: Program, symbol: str) -> str:
    """The linker name of a kernel, as the kernels' object must define it."""
    return f"{program.name}_k_{symbol}"


def check_name(name: str) -> None:
    """Guard: `name` can name a library, its C symbols and its Python module.

    Raises:
        GraphoptError: it cannot; says why.
    """
    hint = "name= is a C identifier: letters, digits and underscores, at most 64, a letter first."
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name):
        raise GraphoptError(f"{name!r} cannot be the name of a library", hint=hint)
    if name in _RESERVED or keyword.iskeyword(name):
        raise GraphoptError(
            f"{name!r} cannot be the name of a library: the word is taken in C or Python", hint=hint
        )
    if name in _PYTHON_MODULES:
        raise GraphoptError(
            f"{name!r} cannot be the name of a library: {name}.py would hide Python's own module",
            hint=hint,
        )


def check_program(program: Program) -> None:
    """Guard: the program keeps to what the generated C relies on.

    Raises:
        GraphoptError: the name cannot prefix C symbols, or (a bug in lowering) a buffer lies
            outside its memory or a step names a buffer that does not exist.
    """
    check_name(program.name)
    interface = (*program.inputs, *program.outputs)
    if len(set(interface)) != len(interface) or not program.outputs:
        raise GraphoptError(f"inputs and outputs must be distinct buffers: {list(interface)}")
    for name in interface:
        role = "input" if name in program.inputs else "output"
        if name not in program.buffers or program.buffers[name].role != role:
            raise GraphoptError(f"{name} is an {role} of the program, but no such buffer is")
    for buffer in program.buffers.values():
        _check_buffer(program, buffer)
    for step in program.steps:
        unknown = [name for name in step.args if name not in program.buffers]
        if unknown:
            raise GraphoptError(f"step {step.kernel.symbol} uses unknown buffers {unknown}")
        if not 0 <= step.tasks < 2**31 or not 0 <= step.scratch <= program.scratch:
            raise GraphoptError(
                f"step {step.kernel.symbol}: {step.tasks} tasks with {step.scratch} bytes of "
                f"scratch do not fit the program ({program.scratch} bytes)"
            )


def _check_buffer(program: Program, buffer: Buffer) -> None:
    if buffer.role in ("input", "output"):
        expected = math.prod(buffer.shape) * np.dtype(buffer.dtype).itemsize
        if buffer.dtype not in C_TYPES or buffer.nbytes != expected or expected == 0:
            raise GraphoptError(
                f"{buffer.role} {buffer.name} ({buffer.dtype}, {list(buffer.shape)}, "
                f"{buffer.nbytes} bytes) cannot be passed through the C interface",
                hint="inputs and outputs are dense, not empty, and of a numpy type that C has.",
            )
        return
    limit = program.weights if buffer.role == "constant" else program.arena
    if buffer.offset % ALIGNMENT or buffer.offset < 0 or buffer.offset + buffer.nbytes > limit:
        raise GraphoptError(
            f"buffer {buffer.name} at {buffer.offset} with {buffer.nbytes} bytes is misaligned or "
            f"lies outside its {limit} bytes"
        )
    if buffer.role == "constant" and (buffer.data is None or buffer.data.nbytes != buffer.nbytes):
        raise GraphoptError(f"constant {buffer.name} has no data of {buffer.nbytes} bytes")


def emit_weights(program: Program) -> bytes:
    """All constants at their offsets, gaps zero."""
    blob = bytearray(program.weights)
    for buffer in program.buffers.values():
        if buffer.role == "constant" and buffer.data is not None:
            data = np.ascontiguousarray(buffer.data).tobytes()
            blob[buffer.offset : buffer.offset + buffer.nbytes] = data
    return bytes(blob)


def emit_source(program: Program, target: Target, *, threads: int, version: str) -> str:
    """The model's C file, compiled with `-DGRAPHOPT_PREFIX=<name>` beside the runtime."""
    parts = [
        f"/* {program.name}: generated by graphopt {version}. */",
        '#include "graphopt_runtime.h"\n',
        _weights(program),
        *_kernel_declarations(program),
        "",
        *(_step_function(program, index, step) for index, step in enumerate(program.steps)),
        _table("static const graphopt_step steps[]", [
            f"{{step_{i}, {s.tasks}, {max(1, min(s.grain, 2**31 - 1))}}}"
            for i, s in enumerate(program.steps)
        ]),
        _table("static const char *const step_names[]",
               [_string(step.kernel.symbol) for step in program.steps]),
        _tables(program),
        _features(target),
        _tensors(program, "input", program.inputs),
        _tensors(program, "output", program.outputs),
        _model(program, target, threads=threads, version=version),
    ]  # fmt: skip
    return "\n".join(parts)


def _string(text: str) -> str:
    # Octal escapes end after three digits, hexadecimal ones do not; `?` could begin a trigraph.
    out = "".join(
        chr(b) if 32 <= b < 127 and b not in b'"\\?' else f"\\{b:03o}" for b in text.encode()
    )
    return f'"{out}"'


def _table(head: str, rows: list[str]) -> str:
    # C11 has no empty arrays; the counts say that the one row is not meant.
    return f"{head} = {{\n" + "".join(f"    {row},\n" for row in rows or ["{0}"]) + "};\n"


def _weights(program: Program) -> str:
    if not program.weights:
        return ""
    return f"""extern const unsigned char graphopt_weights[] __attribute__((visibility("hidden")));
__asm__(".pushsection .rodata.{program.name}_weights,\\"a\\"\\n"
        ".balign {ALIGNMENT}\\n"
        ".globl {program.name}_rt_weights\\n"
        ".hidden {program.name}_rt_weights\\n"
        "{program.name}_rt_weights:\\n"
        ".incbin \\"{WEIGHTS_FILE}\\"\\n"
        ".popsection\\n");
"""


def _kernel_declarations(program: Program) -> list[str]:
    seen: dict[str, str] = {}
    for step in program.steps:
        params = ["void *"] * (len(step.args) + bool(step.scratch)) + ["int32_t", "int32_t"]
        symbol = kernel_symbol(program, step.kernel.symbol)
        line = f"void {symbol}({', '.join(params)});"
        if seen.setdefault(symbol, line) != line:
            raise GraphoptError(f"two steps call {symbol} with different parameters")
    return list(seen.values())


def _step_function(program: Program, index: int, step: Step) -> str:
    args = [_pointer(program, program.buffers[name]) for name in step.args]
    args += ["scratch"] if step.scratch else []
    lines = [
        f"static void step_{index}(const graphopt_frame *frame, void *scratch, int32_t begin,",
        f"                   {' ' * len(str(index))}int32_t end) {{",
        f"    {kernel_symbol(program, step.kernel.symbol)}(",
        *(f"        {arg}," for arg in args),
        "        begin, end);",
    ]
    if not step.scratch:
        lines.append("    (void)scratch;")
    if not any("frame->" in arg for arg in args):
        lines.append("    (void)frame;")
    return "\n".join([*lines, "}\n"])


def _pointer(program: Program, buffer: Buffer) -> str:
    if buffer.role == "arena":
        return f"frame->arena + {buffer.offset}"
    if buffer.role == "constant":
        return f"(void *)((uintptr_t)graphopt_weights + {buffer.offset})"
    if buffer.role == "input":
        # Kernels take plain pointers, and never write through this one.
        return f"(void *)(uintptr_t)frame->inputs[{program.inputs.index(buffer.name)}].data"
    return f"frame->outputs[{program.outputs.index(buffer.name)}].data"


def _features(target: Target) -> str:
    rows = [
        f"{{{_string(name)}, {p.leaf:#x}u, {p.subleaf}, {p.reg}, {p.mask:#x}u, {p.xcr0:#x}u}}"
        for name, p in probes(target.arch, target.features)
    ]
    return _table("static const graphopt_feature features[]", rows)


def _tables(program: Program) -> str:
    rows = [f"{{graphopt_weights + {b.offset}, {b.nbytes}}}" for b in _sparse(program)]
    return _table("static const graphopt_table tables[]", rows)


def _sparse(program: Program) -> list[Buffer]:
    return [buffer for buffer in program.buffers.values() if buffer.sparse]


def _tensors(program: Program, kind: str, names: tuple[str, ...]) -> str:
    shapes = []
    rows = []
    for index, name in enumerate(names):
        buffer = program.buffers[name]
        dims = ", ".join(str(dim) for dim in buffer.shape) or "1"
        shapes.append(f"static const int64_t {kind}_{index}_shape[] = {{{dims}}};\n")
        rows.append(
            f"{{{_string(name)}, {_string(buffer.dtype)}, {kind}_{index}_shape, "
            f"{len(buffer.shape)}, {np.dtype(buffer.dtype).itemsize}, {buffer.nbytes}}}"
        )
    return "".join(shapes) + _table(f"static const graphopt_tensor_info {kind}s[]", rows)


def _model(program: Program, target: Target, *, threads: int, version: str) -> str:
    return f"""const graphopt_model_data graphopt_model = {{
    .info = {{
        .name = {_string(program.name)},
        .version = {_string(version)},
        .target = {_string(target.name)},
        .abi = 1,
        .threads = {threads},
        .input_count = {len(program.inputs)},
        .output_count = {len(program.outputs)},
        .inputs = inputs,
        .outputs = outputs,
        .arena_bytes = {program.arena},
        .scratch_bytes = {program.scratch},
        .weights_bytes = {program.weights},
        .step_count = {len(program.steps)},
        .step_names = step_names,
    }},
    .steps = steps,
    .features = features,
    .feature_count = {len(target.features)},
    .tables = tables,
    .table_count = {len(_sparse(program))},
}};
"""


def emit_header(program: Program, target: Target, *, version: str) -> str:
    """The model's public C header: its own numbers, then the interface under its prefix."""
    text = resources.files("graphopt.runtime.csrc").joinpath("graphopt_api.h").read_text("utf-8")
    upper = program.name.upper()
    text = re.sub(r"\bGRAPHOPT_", f"{upper}_", text)
    text = re.sub(r"\bgraphopt_", f"{program.name}_", text)
    guard = f"GRAPHOPT_MODEL_{upper}_H"
    head = f"""/* {program.name}, compiled by graphopt {version} for {_comment(target.name)}. */
#ifndef {guard}
#define {guard}

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {{
#endif

/* ---------------------------------------------------------------------------------------------
 * This model: how many inputs and outputs it has, and for each its index in the arrays `run`
 * takes, its shape, elements and bytes, and the C type of an element. bool is 0 or 1 in a
 * uint8_t, float16 the IEEE bits in a uint16_t.
 * ------------------------------------------------------------------------------------------ */

#define {upper}_INPUTS {len(program.inputs)}
#define {upper}_OUTPUTS {len(program.outputs)}
"""
    used: set[str] = set()
    body = [
        _tensor_macros(program, kind, index, name, used)
        for kind, names in (("INPUT", program.inputs), ("OUTPUT", program.outputs))
        for index, name in enumerate(names)
    ]
    return f"""{head}
{"".join(body)}{text}
#ifdef __cplusplus
}}
#endif

#endif /* {guard} */
"""


def _comment(text: str) -> str:
    return json.dumps(text)[1:-1].replace("*/", "* /").replace("/*", "/ *").replace("??", "? ?")


def _tensor_macros(program: Program, kind: str, index: int, name: str, used: set[str]) -> str:
    buffer = program.buffers[name]
    count = math.prod(buffer.shape)
    prefix = f"{program.name.upper()}_{kind}_"
    suffixes = ("", "_SHAPE", "_RANK", "_ELEMENTS", "_BYTES")
    stem = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_").upper() or str(index)
    # "x" and "x_bytes" would both define ..._X_BYTES, and "a.b" and "a_b" the same everything.
    while any(prefix + stem + suffix in used for suffix in suffixes):
        stem += f"_{index}"
    used.update(prefix + stem + suffix for suffix in suffixes)
    macro = prefix + stem
    dims = ", ".join(str(dim) for dim in buffer.shape)
    return f"""/* {kind.lower()} {index}: {_comment(name)}, {buffer.dtype} [{dims}] */
#define {macro} {index}
#define {macro}_SHAPE {{{dims or "1"}}}
#define {macro}_RANK {len(buffer.shape)}
#define {macro}_ELEMENTS {count}
#define {macro}_BYTES {buffer.nbytes}
typedef {C_TYPES[buffer.dtype]} {program.name}_{kind.lower()}_{index}_t;

"""
