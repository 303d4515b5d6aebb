"""The transcendental functions: measured error, special values, and the code they compile to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from graphopt.ops import activation, error_function, power, trigonometry
from graphopt.ops import math as m
from graphopt.ops.elementwise import ELEMENTWISE
from tests.ops.evaluate import ARM64, X86, X86_NO_FMA, Function, Library, function_bodies, lower

Reference = Callable[[torch.Tensor], torch.Tensor]


def _softplus(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(2 * (2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))


# function, exact value, domain, largest error in ulp where the result is normal.
EXACT: dict[str, tuple[Reference, tuple[float, float], float]] = {
    "exp": (torch.exp, (-np.inf, np.inf), 1.05),
    "exp_nonpositive": (torch.exp, (-87.3, 0.0), 1.05),
    "exp2_nonpositive": (torch.exp2, (-126.0, 0.0), 2.2),
    "expm1": (torch.expm1, (-np.inf, np.inf), 1.5),
    "log_natural": (torch.log, (-np.inf, np.inf), 0.9),
    "exp2": (torch.exp2, (-np.inf, np.inf), 1.5),
    "log2": (torch.log2, (-np.inf, np.inf), 2.5),
    "log10": (torch.log10, (-np.inf, np.inf), 2.5),
    "log1p": (torch.log1p, (-np.inf, np.inf), 1.5),
    "asin": (torch.asin, (-np.inf, np.inf), 2.5),
    "acos": (torch.acos, (-np.inf, np.inf), 2.5),
    "atan": (torch.atan, (-np.inf, np.inf), 2.0),
    "sinh": (torch.sinh, (-np.inf, np.inf), 4.0),
    "cosh": (torch.cosh, (-np.inf, np.inf), 4.0),
    "asinh": (torch.asinh, (-np.inf, np.inf), 4.0),
    "acosh": (torch.acosh, (-np.inf, np.inf), 4.0),
    "atanh": (torch.atanh, (-np.inf, np.inf), 4.0),
    "tanh": (torch.tanh, (-np.inf, np.inf), 2.4),
    "sigmoid": (torch.sigmoid, (-87.3, np.inf), 2.5),
    "silu": (lambda x: x * torch.sigmoid(x), (-87.3, np.inf), 3.2),
    "softplus": (_softplus, (-87.3, np.inf), 2.5),
    "mish": (lambda x: x * torch.tanh(_softplus(x)), (-80.0, np.inf), 5.0),
    "erf": (torch.erf, (-np.inf, np.inf), 1.5),
    "erfc": (torch.erfc, (-np.inf, np.inf), 2.0),
    "rsqrt": (torch.rsqrt, (-np.inf, np.inf), 1.5),
}
# function, exact value, error per |x| (a share of the input, as both are x times a probability).
RELATIVE: dict[str, tuple[Reference, float]] = {
    "gelu": (lambda x: x * torch.special.erfc(-x / 2**0.5) / 2, 2.5e-7),
    "gelu_tanh": (_gelu_tanh, 2e-7),
}
ANGLES: dict[str, Reference] = {"sin": torch.sin, "cos": torch.cos}
NAMES = (*EXACT, *RELATIVE, *ANGLES, "tan")
FUNCTIONS = {
    name: Function(getattr(module, name), ("float32",), "float32")
    for name in NAMES
    for module in (m, activation, error_function, trigonometry)
    if hasattr(module, name)
}
EDGES = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 2.0**-126, 88.72283, 88.72284, -103.97,
     -104.0, 1.0, -1.0, 3.4e38, -3.4e38, 5.6, -5.6, 0.58, 3.95],
    np.float32,
)  # fmt: skip


def _inputs() -> np.ndarray:
    random = np.random.default_rng(0)
    pattern = random.integers(0, 2**32, 300_000, dtype=np.uint64).astype(np.uint32)
    wide = random.uniform(-110, 110, 100_000)
    near = random.uniform(-10, 10, 100_000)
    small = random.uniform(-1, 1, 100_000)
    spread = np.concatenate([wide, near, small]).astype(np.float32)
    return np.concatenate([pattern.view(np.float32), spread, EDGES])


INPUTS = _inputs()


@pytest.fixture(scope="module", params=[X86, X86_NO_FMA], ids=lambda target: target["mcpu"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(FUNCTIONS, tmp_path_factory.mktemp("math"), request.param)


def _exact(reference: Reference, x: np.ndarray) -> np.ndarray:
    return np.asarray(reference(torch.from_numpy(x.astype(np.float64))))


def test_functions_are_known_to_be_heavy() -> None:
    """Fusion bounds how many of them one kernel computes. A square root is one instruction."""
    heavy = {op.name for op in ELEMENTWISE if op.name in NAMES and op.heavy}
    assert heavy == {op.name for op in ELEMENTWISE if op.name in NAMES} - {"rsqrt"}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", EXACT)
def test_error_in_ulp(library: Library, name: str) -> None:
    reference, (low, high), bound = EXACT[name]
    x = INPUTS[((low <= INPUTS) & (high >= INPUTS)) | np.isnan(INPUTS)]
    got, exact = library.run(name, x), _exact(reference, x)
    rounded = exact.astype(np.float32)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(rounded))
    infinite = np.isinf(rounded)
    np.testing.assert_array_equal(got[infinite], rounded[infinite])
    finite = np.isfinite(rounded)
    error = np.abs(got - exact)[finite] / np.spacing(np.abs(rounded[finite]))
    normal = np.abs(rounded[finite]) >= 2.0**-126
    assert error[normal].max() <= bound
    # Below, results keep their place to 1 (denormal) ulp, where the function says so.
    if name in (
        "exp",
        "exp2",
        "expm1",
        "log1p",
        "tanh",
        "erf",
        "erfc",
        "atan",
        "asin",
        "sinh",
        "asinh",
    ):
        assert error[~normal].max() <= 1.0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", RELATIVE)
def test_error_of_gelu(library: Library, name: str) -> None:
    reference, bound = RELATIVE[name]
    x = INPUTS[np.isfinite(INPUTS)]
    error = np.abs(library.run(name, x) - _exact(reference, x))
    assert (error <= bound * np.abs(x) + 1e-37).all()
    want = np.array([0.0, -0.0, np.inf, 0.0, np.nan], np.float32)
    np.testing.assert_allclose(library.run(name, EDGES[:5]), want, rtol=0, atol=1e-36)


@pytest.mark.parametrize("name", ANGLES)
def test_error_of_sine_and_cosine(library: Library, name: str) -> None:
    x = INPUTS[np.abs(INPUTS) <= 1e4]
    assert np.abs(library.run(name, x) - _exact(ANGLES[name], x)).max() <= 1e-7
    assert np.isnan(library.run(name, EDGES[2:5])).all()


def test_error_of_tangent(library: Library) -> None:
    """Near its poles the tangent is as wrong as the angle is, times its slope."""
    x = INPUTS[np.abs(INPUTS) <= 1e4]
    exact = _exact(torch.tan, x)
    assert (np.abs(library.run("tan", x) - exact) <= 1.5e-7 * (1 + exact**2)).all()
    assert np.isnan(library.run("tan", EDGES[2:5])).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_error_of_atan2(tmp_path: Path) -> None:
    function = Function(trigonometry.atan2, ("float32", "float32"), "float32")
    library = Library({"atan2": function}, tmp_path)
    random = np.random.default_rng(2)
    special = np.meshgrid(EDGES, EDGES)
    y, x = (
        np.concatenate([random.uniform(-9, 9, 200_000), grid.ravel()]).astype(np.float32)
        for grid in special
    )
    got = library.run("atan2", y, x)
    exact = np.arctan2(y.astype(np.float64), x.astype(np.float64))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(exact))
    known = ~np.isnan(exact)
    np.testing.assert_array_equal(np.signbit(got)[known], np.signbit(exact)[known])
    normal = known & (np.abs(exact) >= 2.0**-126)
    rounded = np.abs(exact[normal].astype(np.float32))
    assert (np.abs(got - exact)[normal] / np.spacing(rounded)).max() <= 3.0


def test_powers_of_two_are_exact(library: Library) -> None:
    exponents = np.arange(-126, 128, dtype=np.float32)
    powers = np.ldexp(np.float32(1), exponents.astype(np.int32))
    np.testing.assert_array_equal(library.run("log2", powers), exponents)
    np.testing.assert_array_equal(library.run("exp2", exponents), powers)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_power(tmp_path: Path) -> None:
    function = Function(power.pow, ("float32", "float32"), "float32")
    library = Library({"power": function}, tmp_path)
    random = np.random.default_rng(1)
    base = np.concatenate([random.uniform(0, 10, 200_000), random.uniform(-9, 9, 50_000)])
    exponent = np.concatenate(
        [random.uniform(-20, 20, 200_000), random.integers(-9, 9, 50_000)]
    )  # fmt: skip
    special = np.array(
        [0.0, -0.0, 1, -1, 2, -2, 0.5, -0.5, 3, -3, np.inf, -np.inf, np.nan, 1e30, -1e30, 1e-40]
    )
    pairs = np.meshgrid(special, special)
    x = np.concatenate([base, pairs[0].ravel()]).astype(np.float32)
    y = np.concatenate([exponent, pairs[1].ravel()]).astype(np.float32)
    got = library.run("power", x, y)
    exact = np.power(x.astype(np.float64), y.astype(np.float64))
    want = exact.astype(np.float32)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(np.signbit(got)[~np.isnan(want)],
                                  np.signbit(want)[~np.isnan(want)])  # fmt: skip
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
    finite = np.isfinite(want)
    error = np.abs(got - exact)[finite] / np.spacing(np.abs(want[finite]))
    assert error.max() <= 1.0


def test_signed_zeros(library: Library) -> None:
    zeros = np.array([0.0, -0.0], np.float32)
    for name in ("expm1", "log1p", "tanh", "erf", "sin", "silu", "mish", "gelu", "tan", "asin",
                 "atan", "sinh", "asinh", "atanh"):  # fmt: skip
        np.testing.assert_array_equal(np.signbit(library.run(name, zeros)), [False, True], name)


def test_vector_loops_call_nothing(library: Library) -> None:
    bodies = function_bodies(library.assembly, list(FUNCTIONS))
    assert set(bodies) == set(FUNCTIONS)
    for name, body in bodies.items():
        assert "call" not in body, name
        assert "mulps" in body or "mulpd" in body or "divps" in body, name


def test_vector_loops_call_nothing_on_arm() -> None:
    bodies = function_bodies(lower(FUNCTIONS, ARM64).inspect_source("asm"), list(FUNCTIONS))
    assert set(bodies) == set(FUNCTIONS)
    for name, body in bodies.items():
        assert "\tbl\t" not in body, name
        assert ".4s" in body, name


def test_code_stays_small(tmp_path: Path) -> None:
    """Composed functions grow by the sum of their parts, not by the product."""

    def chain(x: object) -> object:
        return activation.gelu(activation.silu(x))

    library = Library({"chain": Function(chain, ("float32",), "float32")}, tmp_path)
    assert function_bodies(library.assembly, ["chain"])["chain"].count("\n") < 1500
