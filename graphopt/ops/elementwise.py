"""Elementwise operators."""

from __future__ import annotations

from graphopt.ops.opdef import OpDef

ELEMENTWISE: tuple[OpDef, ...] = ()
