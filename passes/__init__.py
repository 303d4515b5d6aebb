"""Graph to graph: the passes, the manager that runs them, and the verifier that checks them."""

from graphopt.passes.base import (
    APPROX,
    EXACT,
    LOSSY,
    Context,
    Effect,
    Note,
    NoteBook,
    Pass,
    PassResult,
)
from graphopt.passes.manager import PassRecord, run_passes
from graphopt.passes.pipeline import all_passes, default_pipeline, resolve
from graphopt.passes.rewrite import Editor, Refusal, Rule, apply_rules
from graphopt.passes.verify import Interface, Verifier, interface_of, verify

__all__ = [
    "APPROX",
    "EXACT",
    "LOSSY",
    "Context",
    "Editor",
    "Effect",
    "Interface",
    "Note",
    "NoteBook",
    "Pass",
    "PassRecord",
    "PassResult",
    "Refusal",
    "Rule",
    "Verifier",
    "all_passes",
    "apply_rules",
    "default_pipeline",
    "interface_of",
    "resolve",
    "run_passes",
    "verify",
]
