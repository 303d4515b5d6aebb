"""Group and instance norm of whole small networks, from PyTorch and from ONNX, against PyTorch."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import graphopt
from graphopt.backends.target import get_target

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SPACE = ((37,), (9, 7), (5, 4, 3))


def norm_between_layers(
    channels: int, groups: int, dims: int, affine: bool, seed: int = 0
) -> nn.Module:
    """Convolution, norm, activation, convolution; all weights random."""
    torch.manual_seed(seed)
    norm = nn.GroupNorm(groups, channels, affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    conv = CONVS[dims - 1]
    return nn.Sequential(conv(3, channels, 1), norm, nn.ReLU(), conv(channels, 5, 1)).eval()


class Side(nn.Module):
    """Networks side by side, an input for each."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(net(x) for net, x in zip(self.networks, inputs, strict=True))


def largest_error(actual: object, expected: torch.Tensor) -> float:
    """Relative to the largest output."""
    error = np.abs(np.asarray(actual) - expected.numpy()).max()
    return float(error / expected.abs().max())


# Channels and groups: groups of 1, 2, 3, 4, 8, 10, 12, 16 channels, whole blocks or not.
SIZES = [(12, 1), (12, 3), (12, 12), (20, 2), (10, 5), (32, 4), (64, 4), (16, 16), (8, 1)]


@settings(max_examples=4, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    st.integers(1, 2),
    st.lists(
        st.tuples(st.sampled_from(SIZES), st.integers(1, 3), st.booleans()), min_size=4, max_size=6
    ),
)
def test_any_groups(batch: int, cases: list[tuple[tuple[int, int], int, bool]]) -> None:
    nets = [norm_between_layers(*size, dims, affine, i) for i, (size, dims, affine) in
            enumerate(cases)]  # fmt: skip
    inputs = tuple(torch.randn(batch, 3, *SPACE[dims - 1]) for _, dims, _ in cases)
    model = Side(nets).eval()
    compiled = graphopt.compile(model, inputs, name="norms")
    assert not any("layer_norm" in step.ops for step in compiled.program.steps)
    with torch.no_grad():
        expected = model(*inputs)
    for actual, wanted in zip(compiled(*inputs), expected, strict=True):
        # Some roundings of sums of up to 3,000 terms.
        assert largest_error(actual, wanted) < 3e-6


@pytest.mark.parametrize("target", ["x86-64-v2", "arm"])
def test_other_instruction_sets(target: str) -> None:
    nets = [norm_between_layers(12, 3, 2, True), norm_between_layers(24, 24, 2, True)]
    model = Side(nets).eval()
    inputs = tuple(torch.randn(2, 3, 6, 5) for _ in range(2))
    compiled = graphopt.compile(model, inputs, name="norms", target=get_target(target))
    with torch.no_grad():
        expected = model(*inputs)
    for actual, wanted in zip(compiled(*inputs), expected, strict=True):
        assert largest_error(actual, wanted) < 3e-6


def test_blocks_stay_and_squares_are_not_stored() -> None:
    model = norm_between_layers(32, 4, 2, True)
    x = torch.randn(1, 3, 8, 8)
    program = graphopt.compile(model, (x,), name="norm").program
    whole = [
        (step.ops, program.buffers[step.writes[0]].layout)
        for step in program.steps
        if program.buffers[step.writes[0]].shape == (1, 32, 8, 8)
    ]
    block = f"NCHW{get_target('host').isa.block}c"
    assert whole == [(("convolution",), block), (("sub", "mul", "mul", "add", "relu"), block)]
    assert [step.ops for step in program.steps].count(("sub", "mul", "mean")) == 1


def test_large_means() -> None:
    """E[x²] − E[x]² would lose all digits; a float32 has steps of 6e-5 at 1000."""

    def passed_through(norm: nn.Module, dtype: torch.dtype) -> nn.Module:
        layers = [nn.Conv2d(16, 16, 1, bias=False) for _ in range(2)]
        for layer in layers:
            layer.weight.data = torch.eye(16)[:, :, None, None].clone()
        return nn.Sequential(layers[0], norm, layers[1]).to(dtype).eval()

    x = torch.randn(1, 16, 40, 40, generator=torch.Generator().manual_seed(0)) + 1000
    groups = (1, 2, 16)
    nets = [passed_through(nn.GroupNorm(n, 16), torch.float32) for n in groups]
    compiled = graphopt.compile(Side(nets).eval(), (x,) * 3, name="norms")
    for actual, n in zip(compiled(*(x,) * 3), groups, strict=True):
        with torch.no_grad():
            expected = passed_through(nn.GroupNorm(n, 16), torch.float64)(x.double())
        # Ten of those steps, of a deviation of 1; PyTorch is off by up to two.
        assert np.abs(np.asarray(actual) - expected.numpy()).max() < 6e-4


def exported(model: nn.Module, x: torch.Tensor, opset: int) -> onnx.ModelProto:
    """As PyTorch writes group norm before opset 21: by an InstanceNormalization."""
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, opset_version=opset, dynamo=False)
    return onnx.load_from_string(file.getvalue())


def with_operator(model: nn.Sequential, x: torch.Tensor, opset: int) -> onnx.ModelProto:
    """The network with the operator GroupNormalization."""
    first, norm, _, last = model
    names = ("w1", "b1", "s", "t", "w2", "b2")
    values = (first.weight, first.bias, norm.weight, norm.bias, last.weight, last.bias)
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"]),
        helper.make_node("GroupNormalization", ["a", "s", "t"], ["b"], num_groups=norm.num_groups),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Conv", ["c", "w2", "b2"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "norm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, model(x).shape)],
        [numpy_helper.from_array(value.detach().numpy(), name)
         for name, value in zip(names, values, strict=True)],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    made.ir_version = 10
    return made


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize(("channels", "groups"), [(16, 4), (12, 12), (12, 1)])
def test_onnx(channels: int, groups: int, opset: int, tmp_path: Path) -> None:
    model = norm_between_layers(channels, groups, 2, affine=True)
    assert isinstance(model, nn.Sequential)
    if groups == channels and opset == 17:
        norm = nn.InstanceNorm2d(channels, affine=True)
        norm.weight, norm.bias = model[1].weight, model[1].bias
        model[1] = norm
    x = torch.randn(2, 3, 6, 5)
    with torch.no_grad():
        expected = model(x)
        proto = exported(model, x, opset) if opset < 21 else with_operator(model, x, opset)
    path = tmp_path / "norm.onnx"
    onnx.save(proto, path)
    compiled = graphopt.compile(path)
    assert not any("layer_norm" in step.ops for step in compiled.program.steps)
    result = compiled(*[x.numpy()])
    assert largest_error(result, expected) < 3e-6


def test_pooling_after_it_works_on_blocks() -> None:
    """A PoolFormer's mixer: pool(norm(x)) − norm(x), scaled and added to x."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, padding=1)
            self.norm = nn.GroupNorm(1, 16)
            self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
            self.scale = nn.Parameter(torch.randn(16, 1, 1))
            self.head = nn.Conv2d(16, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            y = self.norm(x)
            return self.head(x + self.scale * (self.pool(y) - y))

    torch.manual_seed(0)
    model, x = Mixer().eval(), torch.randn(1, 3, 11, 13)
    compiled = graphopt.compile(model, (x,), name="mixer")
    (pool,) = (step for step in compiled.program.steps if "avg_pool2d" in step.ops)
    assert pool.kernel.origin.startswith("pool")
    assert pool.ops == ("avg_pool2d", "sub", "mul", "add")
    with torch.no_grad():
        assert largest_error(compiled(x), model(x)) < 3e-6
