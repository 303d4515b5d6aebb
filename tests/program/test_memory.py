"""The arena plan: no two tensors that live at once overlap, and little is wasted."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.program.ir import ALIGNMENT, Buffer, Kernel, Step
from graphopt.program.memory import (
    Lifetime,
    largest_live,
    lifetimes_of,
    plan_offsets,
    round_up,
)


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Lifetime]:
    tensors = []
    for i in range(draw(st.integers(0, 25))):
        first = draw(st.integers(0, 20))
        last = first + draw(st.integers(0, 8))
        tensors.append(Lifetime(f"t{i}", draw(st.integers(1, 5000)), first, last))
    return tensors


@settings(max_examples=200, deadline=None)
@given(lifetimes())
def test_live_tensors_never_overlap(tensors: list[Lifetime]) -> None:
    offsets, total = plan_offsets(tensors)
    assert set(offsets) == {t.name for t in tensors}
    for i, a in enumerate(tensors):
        assert offsets[a.name] % ALIGNMENT == 0
        assert offsets[a.name] + a.nbytes <= total
        for b in tensors[i + 1 :]:
            if a.first <= b.last and b.first <= a.last:
                low, high = sorted((a, b), key=lambda t: offsets[t.name])
                assert offsets[low.name] + low.nbytes <= offsets[high.name]
    assert largest_live(tensors) <= total <= sum(round_up(t.nbytes) for t in tensors)


@settings(max_examples=50, deadline=None)
@given(lifetimes(), st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order(tensors: list[Lifetime], random: object) -> None:
    shuffled = list(tensors)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert plan_offsets(shuffled) == plan_offsets(tensors)


def test_a_chain_needs_two_tensors() -> None:
    chain = [Lifetime(f"t{i}", 1000, i, i + 1) for i in range(10)]
    assert plan_offsets(chain)[1] == 2 * round_up(1000)
    assert largest_live(chain) == 2000


def test_nothing_needs_nothing() -> None:
    assert plan_offsets([]) == ({}, 0)
    assert largest_live([]) == 0


def test_lifetimes_of_steps() -> None:
    roles = {"x": "input", "w": "constant", "a": "arena", "b": "arena", "y": "output"}
    buffers = {n: Buffer(n, (4,), "float32", "plain", r, 16) for n, r in roles.items()}  # type: ignore[arg-type]
    kernel = Kernel("k", None, "test")
    calls = [("x", "w", "a"), ("a", "b"), ("b", "a", "y")]
    steps = [Step(kernel, args, args[:-1], args[-1:], 1) for args in calls]
    assert lifetimes_of(steps, buffers) == {
        "a": Lifetime("a", 16, 0, 2),
        "b": Lifetime("b", 16, 1, 2),
    }
