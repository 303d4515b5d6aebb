"""The contract of a pass: what it is called, how much it may change values, and what it reports."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from graphopt.graph import Origin


@dataclass(frozen=True)
class Effect:
    """How far a pass may move the model's outputs.

    `exact`: not by one bit. `approx`: by rounding, so that
    `max|after - before| <= atol + rtol * max|before|` for each output tensor. `lossy`: by an
    amount that is measured and reported.
    """

    kind: Literal["exact", "approx", "lossy"]
    rtol: float = 0.0
    atol: float = 0.0

    def __str__(self) -> str:
        """As it is written in code."""
        if self.kind == "approx":
            return f"APPROX(rtol={self.rtol:g}, atol={self.atol:g})"
        return self.kind.upper()


EXACT = Effect("exact")
LOSSY = Effect("lossy")


def APPROX(rtol: float, atol: float) -> Effect:
    """The effect of a pass that only rounds differently, within these bounds."""
    for bound in (rtol, atol):
        if not (math.isfinite(bound) and bound >= 0):
            raise ValueError(f"a tolerance is a finite number >= 0, not {bound}")
    return Effect("approx", rtol, atol)


@dataclass(frozen=True)
class Note:
    """One line of the report: what a pass did, or refused to do and why, and where.

    Attributes:
        action: `changed` or `refused`.
        what: the rewrite's name.
        reason: why it was refused, or empty.
        count: how often.
        origins: the places in the user's model, each once.
    """

    action: Literal["changed", "refused"]
    what: str
    reason: str
    count: int
    origins: Origin

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        return {**dataclasses.asdict(self), "origins": list(self.origins)}

    def __str__(self) -> str:
        """One line for the report."""
        text = f"{self.what} ×{self.count}" if self.count > 1 else self.what
        if self.action == "refused":
            text = f"refused {text}: {self.reason}"
        if self.origins:
            more = f" and {len(self.origins) - 1} more" if len(self.origins) > 1 else ""
            text += f" (at {self.origins[0]}{more})"
        return text


class NoteBook:
    """Collects what a pass does and groups equal entries into `Note`s."""

    def __init__(self) -> None:
        """Start empty."""
        self._count: Counter[tuple[Literal["changed", "refused"], str, str]] = Counter()
        self._origins: dict[tuple[str, str, str], dict[str, None]] = {}

    def changed(self, what: str, origin: Origin = (), count: int = 1) -> None:
        """Record a change."""
        self._add("changed", what, "", origin, count)

    def refused(self, what: str, reason: str, origin: Origin = ()) -> None:
        """Record a change that was possible in form but would have been wrong or harmful."""
        self._add("refused", what, reason, origin, 1)

    def _add(
        self,
        action: Literal["changed", "refused"],
        what: str,
        reason: str,
        origin: Origin,
        count: int,
    ) -> None:
        key = (action, what, reason)
        self._count[key] += count
        self._origins.setdefault(key, {}).update(dict.fromkeys(origin))

    def notes(self) -> tuple[Note, ...]:
        """Everything recorded, changes first."""
        entries = [
            Note(*key, count, tuple(self._origins[key])) for key, count in self._count.items()
        ]
        return tuple(sorted(entries, key=lambda note: note.action))

    def result(self) -> PassResult:
        """What a pass returns that recorded each of its changes here."""
        notes = self.notes()
        return PassResult(any(note.action == "changed" for note in notes), notes)


@dataclass(frozen=True)
class PassResult:
    """Whether a pass changed the graph, and its notes for the report."""

    changed: bool
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class Context:
    """What passes and the pass manager need besides the graph.

    Attributes:
        samples: sets of input tensors to check with; made up from `seed` if there are none.
        seed: seeds made-up sample inputs.
        verify: 1 checks the graph's form after every pass, 2 also compares values;
            None reads `GRAPHOPT_VERIFY`, which is 1 unless set.
        dump: folder for numbered graph listings; None reads `GRAPHOPT_DUMP`, unset means none.
    """

    samples: tuple[tuple[torch.Tensor, ...], ...] = ()
    seed: int = 0
    verify: int | None = None
    dump: Path | None = field(default=None)


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes. A subclass is a frozen dataclass whose fields are the pass's options.

    It sets `name` (a verb), `effect`, optionally `after` (names of passes that must have run
    before), has a docstring whose first line the command line prints, and defines `run`, which
    edits the graph in place. Calling the pass runs it and holds it to its word.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect]
    after: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check what a subclass must define, when it is defined."""
        super().__init_subclass__(**kwargs)
        name = getattr(cls, "name", None)
        if not (isinstance(name, str) and name.isidentifier()):
            raise TypeError(f"{cls.__name__}.name must be an identifier, not {name!r}")
        if not isinstance(getattr(cls, "effect", None), Effect):
            raise TypeError(f"{cls.__name__}.effect must be EXACT, APPROX(rtol, atol) or LOSSY")
        after = cls.after
        if not (isinstance(after, tuple) and all(isinstance(other, str) for other in after)):
            raise TypeError(f"{cls.__name__}.after must be a tuple of pass names")
        # Looked up on the class itself: an inherited docstring would describe another pass.
        if not (cls.__dict__.get("__doc__") or "").strip():
            raise TypeError(f"{cls.__name__} needs a docstring: what it does, in one line")

    def __post_init__(self) -> None:
        """Check that the subclass is a dataclass of its own, which is frozen like this one."""
        if "__dataclass_params__" not in type(self).__dict__:
            raise TypeError(f"{type(self).__name__} must be a @dataclass(frozen=True)")

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (type(self).__doc__ or "").strip().splitlines()[0]

    @abstractmethod
    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        """Edit the graph in place and say what was done."""

    def __call__(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        """Run the pass; TypeError if it breaks the contract."""
        before = fingerprint(graph)
        result = self.run(graph, ctx)
        if not isinstance(result, PassResult):
            raise TypeError(f"{self.name}.run returned {type(result).__name__}, not PassResult")
        differs = fingerprint(graph) != before
        if result.changed != differs:
            said, did = ("changed", "did not change") if result.changed else ("kept", "changed")
            raise TypeError(f"{self.name} says it {said} the graph but {did} it")
        return result


def fingerprint(graph: fx.GraphModule) -> tuple[object, ...]:
    """Something that differs when nodes, arguments or constants of the graph differ."""
    return (*_describe(graph.graph.nodes), *(name for name, _ in graph.named_buffers()))


def _describe(nodes: Sequence[fx.Node] | Any) -> Iterator[object]:
    for node in nodes:
        yield (node.op, node.name, str(node.target), repr(node.args), repr(node.kwargs))
