"""Rewrite rules (pattern, check, rewrite), their editor, and the loop that applies them."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import fx

from graphopt import graph as g
from graphopt.errors import GraphoptError
from graphopt.graph import Origin
from graphopt.passes._nodes import same_type
from graphopt.passes.base import NoteBook

Match = TypeVar("Match")


@dataclass(frozen=True)
class Refusal:
    """Why a rewrite whose pattern matched is not done."""

    reason: str


class Editor:
    """Edits a graph at one place at a time; new nodes get the origin of the node they stand for."""

    def __init__(self, gm: fx.GraphModule) -> None:
        """Start editing `gm`."""
        self.gm = gm
        self.origin: Origin = ()
        self.added: list[fx.Node] = []
        self.touched: list[fx.Node] = []
        self._erased: set[fx.Node] = set()

    @contextmanager
    def at(self, node: fx.Node) -> Iterator[None]:
        """Insert before `node` and give new nodes its origin."""
        self.origin = g.origin(node)
        with self.gm.graph.inserting_before(node):
            yield

    def call(
        self, target: Callable[..., Any], *args: Any, origin: Origin | None = None, **kwargs: Any
    ) -> fx.Node:
        """Insert an op."""
        place = self.origin if origin is None else origin
        node = g.call(self.gm.graph, target, args, kwargs, origin=place)
        self.added.append(node)
        return node

    def constant(self, hint: str, tensor: torch.Tensor, origin: Origin | None = None) -> fx.Node:
        """Insert a constant."""
        place = self.origin if origin is None else origin
        node = g.add_constant(self.gm, hint, tensor, origin=place)
        self.added.append(node)
        return node

    def gone(self, node: fx.Node) -> bool:
        """Whether this editor erased the node."""
        return node in self._erased

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        """Let users of `node` read `new` instead, and erase `node` and what only it read."""
        # A node that was there before keeps its origin: the replaced one did nothing of its own.
        if new in self.added:
            new.meta["origin"] = g.merge_origins((new, node))
        self.touched.extend(node.users)
        node.replace_all_uses_with(new)
        self.prune(node)

    def prune(self, node: fx.Node) -> None:
        """Erase the node if nothing reads it, and then so on up its inputs.

        Without this, dead readers would make rules believe that a value is still shared.
        """
        stack = [node]
        while stack:
            dead = stack.pop()
            if dead in self._erased or dead.users or dead.op in ("placeholder", "output"):
                continue
            inputs = dead.all_input_nodes
            self.gm.graph.erase_node(dead)
            self._erased.add(dead)
            stack.extend(inputs)
            self.touched.extend(inputs)

    def discard(self, nodes: Iterable[fx.Node]) -> None:
        """Erase nodes of an abandoned rewrite that nothing reads."""
        for node in nodes:
            self.prune(node)


def _always(_gm: fx.GraphModule, _match: Any) -> Refusal | None:
    return None


@dataclass(frozen=True)
class Rule(Generic[Match]):
    """One rewrite of the graph around a root node.

    Attributes:
        name: what it does, for the report.
        roots: the ops of the node it replaces.
        pattern: the parts it needs, or None where it does not apply. Says nothing in the report.
        rewrite: inserts new nodes and returns the one that replaces the root.
        check: why a match must not be rewritten. Goes to the report.
    """

    name: str
    roots: tuple[Callable[..., Any], ...]
    pattern: Callable[[fx.GraphModule, fx.Node], Match | None]
    rewrite: Callable[[Editor, Match], fx.Node]
    check: Callable[[fx.GraphModule, Match], Refusal | None] = _always


def apply_rules(gm: fx.GraphModule, rules: Sequence[Rule[Any]], notes: NoteBook) -> None:
    """Apply the rules, the first that fits first, until none fits anywhere.

    Works through a queue of nodes; after a rewrite only the nodes around it are looked at again,
    so the time grows with the number of nodes and rewrites, not with their product.
    """
    by_root: dict[object, list[Rule[Any]]] = defaultdict(list)
    for rule in rules:
        for target in rule.roots:
            by_root[target].append(rule)
    editor = Editor(gm)
    queue = deque(gm.graph.nodes)
    waiting = set(queue)
    refused: dict[tuple[str, fx.Node], tuple[str, Origin]] = {}
    budget = 1000 + 50 * len(queue)
    while queue:
        node = queue.popleft()
        waiting.discard(node)
        if node.op != "call_function" or editor.gone(node):
            continue
        for rule in by_root.get(node.target, ()):
            refused.pop((rule.name, node), None)
            match = rule.pattern(gm, node)
            if match is None:
                continue
            refusal = rule.check(gm, match)
            if refusal is not None:
                refused[rule.name, node] = (refusal.reason, g.origin(node))
                continue
            budget -= 1
            if budget < 0:
                raise GraphoptError(
                    f"rewrites do not come to an end; the last was {rule.name!r}",
                    where=g.origin(node),
                    hint="this is a bug in graphopt: please report it with the model",
                )
            _rewrite(editor, rule, node, match, notes)
            for near in _neighbours(editor):
                if near not in waiting:
                    waiting.add(near)
                    queue.append(near)
            break
    for (name, node), (reason, origin) in refused.items():
        if not editor.gone(node):
            notes.refused(name, reason, origin)


def _rewrite(editor: Editor, rule: Rule[Any], node: fx.Node, match: Any, notes: NoteBook) -> None:
    editor.added = []
    editor.touched = []
    origin = g.origin(node)
    with editor.at(node):
        new = rule.rewrite(editor, match)
    if not same_type(g.value(new), g.value(node)):
        raise GraphoptError(
            f"rewrite {rule.name!r} turned {g.value(node).dtype}{list(g.shape(node))} "
            f"into {g.value(new).dtype}{list(g.shape(new))}",
            where=origin,
            hint="this is a bug in graphopt: please report it with the model",
        )
    editor.replace(node, new)
    notes.changed(rule.name, origin)


def _neighbours(editor: Editor) -> Iterator[fx.Node]:
    for node in (*editor.added, *editor.touched):
        if editor.gone(node):
            continue
        yield node
        # Rules ask for values with one reader; where that just became true, its reader may match.
        if len(node.users) == 1:
            yield from node.users
