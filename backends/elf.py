"""The little of object files and archives the build needs, the same with every compiler.

Reads a relocatable ELF64 file's symbols, hides or localizes the ones that are not part of the
library's interface, and writes static archives without times, owners or paths.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from graphopt.errors import ToolchainError

_MACHINES = {62: "x86_64", 183: "aarch64"}
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELA = struct.Struct("<QQq")
_SHT_NULL, _SHT_SYMTAB, _SHT_RELA, _SHT_GROUP, _SHT_SYMTAB_SHNDX = 0, 2, 4, 17, 18
_SHT_LLVM_ADDRSIG = 0x6FFF4C03
_STB_LOCAL = 0
_STV_HIDDEN = 2


@dataclass(frozen=True)
class Symbol:
    """One symbol of an object file.

    Attributes:
        name: as the linker sees it.
        defined: whether this file defines it.
        local: whether other files cannot see it.
        hidden: whether it stays inside the library it is linked into.
    """

    name: str
    defined: bool
    local: bool
    hidden: bool


def _sections(data: bytes) -> list[tuple[int, ...]]:
    if len(data) < 64 or data[:6] != b"\x7fELF\x02\x01":
        raise ToolchainError("the compiler's object is not a 64-bit little-endian ELF file")
    (offset,) = struct.unpack_from("<Q", data, 0x28)
    (count,) = struct.unpack_from("<H", data, 0x3C)
    return [_SECTION.unpack_from(data, offset + i * _SECTION.size) for i in range(count)]


def machine(data: bytes) -> str:
    """The architecture an ELF file is for (`x86_64`, `aarch64`, or its ELF number)."""
    _sections(data)
    (number,) = struct.unpack_from("<H", data, 0x12)
    return _MACHINES.get(number, f"ELF machine {number}")


def _name(data: bytes | bytearray, strings: tuple[int, ...], offset: int) -> str:
    begin = strings[4] + offset
    return data[begin : data.index(b"\0", begin)].decode()


def symbols(data: bytes) -> tuple[Symbol, ...]:
    """The named symbols of a relocatable object."""
    sections = _sections(data)
    found = []
    for section in sections:
        if section[1] != _SHT_SYMTAB:
            continue
        for entry in _SYMBOL.iter_unpack(data[section[4] : section[4] + section[5]]):
            name = _name(data, sections[section[6]], entry[0])
            if name:
                visibility = entry[2] & 3
                found.append(Symbol(name, entry[3] != 0, entry[1] >> 4 == _STB_LOCAL,
                                    visibility == _STV_HIDDEN))  # fmt: skip
    return tuple(found)


def restrict(data: bytes, keep: Callable[[str], bool]) -> bytes:
    """The same object where of the defined symbols only those to `keep` can be linked against.

    The kept ones become hidden: they stay inside the library they are linked into. The others
    (a compiler's helper functions, weak so that every object may bring them) become local, so that
    they neither leak out of the library nor replace a program's own.
    """
    out = bytearray(data)
    sections = _sections(data)
    if any(section[1] == _SHT_SYMTAB_SHNDX for section in sections):
        raise ToolchainError("the kernels' object has more than 65,279 sections")
    for index, section in enumerate(sections):
        if section[1] == _SHT_SYMTAB:
            _restrict_table(out, sections, index, keep)
    return bytes(out)


def _restrict_table(
    out: bytearray, sections: list[tuple[int, ...]], index: int, keep: Callable[[str], bool]
) -> None:
    table = sections[index]
    strings = sections[table[6]]
    entries = []
    for offset in range(table[4], table[4] + table[5], _SYMBOL.size):
        name, kind, visibility, section, value, size = _SYMBOL.unpack_from(out, offset)
        if section != 0 and kind >> 4 != _STB_LOCAL:
            if keep(_name(out, strings, name)):
                visibility = (visibility & ~3) | _STV_HIDDEN
            else:
                kind = (_STB_LOCAL << 4) | (kind & 0xF)
                visibility &= ~3
        entries.append((name, kind, visibility, section, value, size))
    # ELF wants the local symbols first; whatever refers to a symbol by number follows.
    order = sorted(range(len(entries)), key=lambda i: entries[i][1] >> 4 != _STB_LOCAL)
    moved = {old: new for new, old in enumerate(order)}
    for new, old in enumerate(order):
        _SYMBOL.pack_into(out, table[4] + new * _SYMBOL.size, *entries[old])
    locals_count = sum(entry[1] >> 4 == _STB_LOCAL for entry in entries)
    _set_info(out, index, locals_count)
    for other, section in enumerate(sections):
        if section[6] != index:
            continue
        if section[1] == _SHT_RELA:
            for offset in range(section[4], section[4] + section[5], _RELA.size):
                where, info, addend = _RELA.unpack_from(out, offset)
                info = moved[info >> 32] << 32 | info & 0xFFFFFFFF
                _RELA.pack_into(out, offset, where, info, addend)
        elif section[1] == _SHT_GROUP:
            _set_info(out, other, moved[section[7]])
        elif section[1] == _SHT_LLVM_ADDRSIG:
            # Only a hint, and its symbol numbers are no longer right: drop it.
            struct.pack_into("<I", out, _section_header(out, other) + 4, _SHT_NULL)


def _section_header(data: bytes | bytearray, index: int) -> int:
    (offset,) = struct.unpack_from("<Q", data, 0x28)
    return int(offset) + index * _SECTION.size


def _set_info(out: bytearray, index: int, value: int) -> None:
    struct.pack_into("<I", out, _section_header(out, index) + 44, value)


def archive(members: Mapping[str, bytes]) -> bytes:
    """A static library (`ar rcsD`) of these objects: zero dates, owners, and no paths."""
    long_names = b"".join(f"{name}/\n".encode() for name in members)
    starts: dict[str, int] = {}
    for name in members:
        starts[name] = sum(len(other) + 2 for other in list(members)[: len(starts)])
    exported = [
        (symbol.name.encode() + b"\0", name)
        for name, data in members.items()
        for symbol in symbols(data)
        if symbol.defined and not symbol.local
    ]
    index_bytes = 4 + 4 * len(exported) + sum(len(symbol) for symbol, _ in exported)
    position = 8 + sum(60 + size + size % 2 for size in (index_bytes, len(long_names)))
    offsets = {}
    for name, data in members.items():
        offsets[name] = position
        position += 60 + len(data) + len(data) % 2
    table = struct.pack(f">I{len(exported)}I", len(exported), *(offsets[n] for _, n in exported))
    parts: list[tuple[str, bytes]] = [
        ("/", table + b"".join(symbol for symbol, _ in exported)),
        ("//", long_names),
        *((f"/{starts[name]}", data) for name, data in members.items()),
    ]
    return b"!<arch>\n" + b"".join(_member(parts))


def _member(parts: Iterable[tuple[str, bytes]]) -> Iterable[bytes]:
    for name, data in parts:
        yield f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        yield data + b"\n" * (len(data) % 2)
