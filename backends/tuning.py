"""What was measured of kernels that can be made in several ways: a file that compiling looks into.

Such a file is never needed: where it says nothing, or names what there no longer is, the cost model
chooses.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from graphopt.backends.kernels import GENERATOR_VERSION
from graphopt.backends.kernels.base import Alternatives
from graphopt.backends.lower import Choice
from graphopt.backends.target import Target
from graphopt.errors import TuningError

SCHEMA = 1
_FORMAT = "graphopt tuning"
_HINT = "name a file that `graphopt tune` wrote, or tune into a new one."


@dataclass(frozen=True)
class Entry:
    """What was measured of one kernel.

    Attributes:
        choice: the candidate to take, in the report's words (`conv_direct 16×6`).
        seconds: the fastest run of it.
        default: what the cost model took; the choice itself if nothing was faster.
        default_seconds: the fastest run of that.
        device: where it was measured, for people.
        threads: how many threads it was measured with.
    """

    choice: str
    seconds: float
    default: str
    default_seconds: float
    device: str
    threads: int

    @property
    def gain(self) -> float:
        """How many times faster the choice is than the default."""
        return self.default_seconds / self.seconds


def key_of(alternatives: Alternatives, target: Target) -> str:
    """What an entry is stored under: the CPU, the versions that make code for it, the kernel.

    Boards with the same CPU share entries. The second-level cache and the number of cores are in
    the key because plans are cut to them: a candidate of the same name is another kernel then.
    """
    return (
        f"{target.isa.name} {target.mcpu} l2={target.l2_bytes // 1024}K cores={target.cores} "
        f"generators={GENERATOR_VERSION} tvm={metadata.version('apache-tvm')} | {alternatives.key}"
    )


class TuningDatabase:
    """Entries by key, in a JSON file.

    Args:
        entries: the entries to begin with.
    """

    def __init__(self, entries: Mapping[str, Entry] | None = None) -> None:
        """See the class for the arguments."""
        self._entries = dict(entries or {})

    def __len__(self) -> int:
        """How many entries there are."""
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        """The keys."""
        return iter(self._entries)

    def __getitem__(self, key: str) -> Entry:
        """The entry of a key."""
        return self._entries[key]

    def __setitem__(self, key: str, entry: Entry) -> None:
        """Store an entry."""
        self._entries[key] = entry

    def __contains__(self, key: object) -> bool:
        """Whether there is an entry."""
        return key in self._entries

    def choice(self, target: Target) -> Choice:
        """Names the stored candidate, for `lower`."""

        def stored(alternatives: Alternatives) -> str | None:
            entry = self._entries.get(key_of(alternatives, target))
            return None if entry is None else entry.choice

        return stored

    def merge(self, other: TuningDatabase) -> None:
        """Take over the entries of another database.

        Where both have a key, the entry with the larger measured gain over its default stays, as
        times of different devices cannot be compared, but ratios can; of equal ones, this one's.
        """
        for key in other:
            if key not in self or other[key].gain > self[key].gain:
                self[key] = other[key]

    @classmethod
    def load(cls, path: str | Path) -> TuningDatabase:
        """Read a file.

        Raises:
            TuningError: it is missing, not a tuning database, or of another schema version.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise TuningError(f"there is no tuning database {path}", hint=_HINT) from error
        except (OSError, UnicodeDecodeError) as error:
            raise TuningError(f"cannot read {path}: {error}", hint=_HINT) from error
        return cls(_parse(text, str(path)))

    def save(self, path: str | Path) -> None:
        """Write a file: the whole of it, or nothing. Equal databases give equal bytes.

        Raises:
            TuningError: the place cannot be written to.
        """
        entries = {key: asdict(self[key]) for key in sorted(self)}
        data = {"format": _FORMAT, "schema": SCHEMA, "entries": entries}
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        path = Path(path)
        stage = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                stage.write_text(text, encoding="utf-8")
                stage.replace(path)
            finally:
                stage.unlink(missing_ok=True)
        except OSError as error:
            raise TuningError(f"cannot write {path}: {error.strerror}") from error


def _parse(text: str, name: str) -> dict[str, Entry]:
    """The entries in a file's text."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise TuningError(f"{name} is not a tuning database: {error}", hint=_HINT) from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise TuningError(f"{name} is not a tuning database", hint=_HINT)
    if data.get("schema") != SCHEMA:
        raise TuningError(
            f"{name} has schema {data.get('schema')!r}; this graphopt reads {SCHEMA}",
            hint="use the graphopt that wrote it, or tune into a new file.",
        )
    entries = data.get("entries")
    if not isinstance(entries, dict):
        raise TuningError(f"{name} has no entries", hint=_HINT)
    return {key: _entry(value, f"{name}: {key}") for key, value in entries.items()}


def _entry(value: Any, where: str) -> Entry:
    kinds: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float)}
    wanted = {field.name: kinds[str(field.type)] for field in fields(Entry)}
    if not isinstance(value, dict) or set(value) != set(wanted):
        raise TuningError(f"{where} should have {', '.join(wanted)}", hint=_HINT)
    for field, kind in wanted.items():
        number = value[field]
        is_wrong = not isinstance(number, kind) or isinstance(number, bool)
        if is_wrong or (kind is not str and not 0 < number < math.inf):
            raise TuningError(f"{where}: {field} cannot be {number!r}", hint=_HINT)
    return Entry(**value)


@cache
def shipped() -> TuningDatabase:
    """What comes with graphopt: every file in `tuned/`; not to be changed."""
    database = TuningDatabase()
    folder = resources.files("graphopt.backends").joinpath("tuned")
    if folder.is_dir():
        for file in sorted(folder.iterdir(), key=lambda each: each.name):
            if file.name.endswith(".json"):
                text = file.read_text(encoding="utf-8")
                database.merge(TuningDatabase(_parse(text, file.name)))
    return database


def find_database(tune: str | Path | TuningDatabase | None) -> TuningDatabase:
    """The entries to compile with: the given ones before those that come with graphopt.

    Raises:
        TuningError: see `TuningDatabase.load`.
    """
    if tune is None:
        return shipped()
    given = tune if isinstance(tune, TuningDatabase) else TuningDatabase.load(tune)
    known = {key: shipped()[key] for key in shipped()}
    return TuningDatabase({**known, **{key: given[key] for key in given}})
