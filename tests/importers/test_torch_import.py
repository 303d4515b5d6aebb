"""Importing nn.Modules, exported programs and .pt2 files."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from graphopt.errors import InputError, ModelError, UnsupportedError
from graphopt.importers import import_model
from tests.importers.onnx_cases import check_form
from tests.importers.test_zoo_import import state_hash

aten = torch.ops.aten


def run(model, *inputs):
    gm = import_model(model, inputs)
    check_form(gm)
    with torch.no_grad():
        return gm(*(torch.as_tensor(x) for x in inputs))


def targets(gm):
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


class Function(nn.Module):
    """A module that computes one function, in eval mode."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, *args):
        return self.function(*args)


KEPT = [
    (lambda x: functional.gelu(x), aten.gelu.default),
    (lambda x: functional.silu(x), aten.silu.default),
    (lambda x: functional.hardswish(x), aten.hardswish.default),
    (lambda x: functional.hardsigmoid(x), aten.hardsigmoid.default),
    (lambda x: functional.leaky_relu(x, 0.2), aten.leaky_relu.default),
    (lambda x: functional.elu(x), aten.elu.default),
    (lambda x: torch.softmax(x, -1), aten.softmax.int),
    (lambda x: functional.max_pool2d(x, 3, 2, 1), aten.max_pool2d.default),
    (lambda x: functional.avg_pool2d(x, 3, 2, 1), aten.avg_pool2d.default),
    (lambda x: functional.adaptive_avg_pool2d(x, 3), aten.adaptive_avg_pool2d.default),
    (lambda x: functional.interpolate(x, scale_factor=2), aten.upsample_nearest2d.vec),
    (lambda x: functional.interpolate(x, (5, 7), mode="bilinear"), aten.upsample_bilinear2d.vec),
    (lambda x: functional.interpolate(x[0], 5, mode="linear"), aten.upsample_linear1d.vec),
    (lambda x: functional.layer_norm(x, (8,)), aten.layer_norm.default),
    (lambda x: x @ x.mT, aten.matmul.default),
    (lambda x: functional.scaled_dot_product_attention(x, x, x),
     aten.scaled_dot_product_attention.default),
]  # fmt: skip


@pytest.mark.parametrize(("function", "target"), KEPT)
def test_composites_stay_whole(function, target):
    x = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    gm = import_model(Function(function), (x,))
    assert target in targets(gm)
    torch.testing.assert_close(gm(x)[0], function(x), rtol=1e-6, atol=1e-6)


BROKEN_UP = [
    lambda x: functional.log_softmax(x, 1),
    lambda x: functional.group_norm(x, 3),
    lambda x: functional.normalize(x, dim=1),
    lambda x: torch.linalg.vector_norm(x, 1, dim=(2, 3)),
    lambda x: x + torch.zeros_like(x) + torch.ones_like(x),
    lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    lambda x: torch.stack(x.unbind(1), 1),
]


@pytest.mark.parametrize("function", BROKEN_UP)
def test_others_are_broken_up(function):
    x = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    gm = import_model(Function(function), (x,))
    composite = {
        aten._log_softmax.default,
        aten.native_group_norm.default,
        aten.full_like.default,
        aten.linalg_vector_norm.default,
    }
    assert not composite & set(targets(gm))
    torch.testing.assert_close(gm(x)[0], function(x), rtol=1e-5, atol=1e-5)


def test_batch_norm_has_one_result():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval()
    gm = import_model(model, torch.randn(1, 2, 5, 5))
    assert targets(gm) == [aten.conv2d.default, aten.batch_norm.default]


def test_in_place_operations_do_not_reach_the_input():
    x = torch.tensor([-1.0, 2.0])
    gm = import_model(Function(lambda x: torch.relu_(x * 1) + x), (x,))
    assert gm(x)[0].tolist() == [-1.0, 4.0]
    assert x.tolist() == [-1.0, 2.0]


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.out = nn.Linear(4, 10, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids, scale, bias=None):
        y = self.out(self.table(ids)) * scale
        y = y if bias is None else y + bias
        return {"logits": y, "parts": [y.sum(-1), y.amax(-1)]}


def test_tied_weights_stay_one():
    gm = import_model(Named().eval(), (np.array([1, 2]), np.float32(2)))
    assert sum(tuple(buffer.shape) == (10, 4) for buffer in gm.buffers()) == 1


def test_inputs_by_name_and_names_of_outputs():
    model = Named().eval()
    given = {"scale": np.ones(1, np.float32), "ids": np.array([1, 2])}
    gm = import_model(model, given)
    assert gm.meta["input_names"] == ("ids", "scale")
    assert gm.meta["output_names"] == ("logits", "parts_0", "parts_1")
    ids, scale = torch.from_numpy(given["ids"]), torch.from_numpy(given["scale"])
    expected = model(ids, scale)
    torch.testing.assert_close(gm(ids, scale)[1], expected["parts"][0])


def test_optional_and_nested_inputs():
    ids, scale, bias = np.array([1]), np.ones(1, np.float32), np.ones(10, np.float32)
    gm = import_model(Named().eval(), (ids, scale, None))
    assert gm.meta["input_names"] == ("ids", "scale")
    gm = import_model(Named().eval(), {"ids": ids, "scale": scale, "bias": bias})
    assert gm.meta["input_names"] == ("ids", "scale", "bias")

    class Nested(nn.Module):
        def forward(self, pair, named):
            return pair[0] + pair[1], named["a"] * 2

    a, b = np.ones(2, np.float32), np.zeros(2, np.float32)
    gm = import_model(Nested().eval(), ((a, b), {"a": a}))
    assert gm.meta["input_names"] == ("pair_0", "pair_1", "named_a")
    assert gm.meta["output_names"] == ("output_0", "output_1")


def test_origins_name_module_and_line():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 3)), nn.ReLU()).eval()
    gm = import_model(model, torch.randn(1, 2))
    origins = [node.meta["origin"] for node in gm.graph.nodes if node.op == "call_function"]
    assert origins == [("0.0 (Linear)",), ("1 (ReLU)",)]
    gm = import_model(Named().eval(), (np.array([1]), np.float32(2)))
    (origin,) = next(n.meta["origin"] for n in gm.graph.nodes if n.op == "call_function")
    assert origin.startswith("table (Embedding), test_torch_import.py:")


def test_origins_of_views_that_are_outputs():
    class Padded(nn.Module):
        def forward(self, x):
            return functional.pad(x, (1, 0), mode="circular").expand(2, 2, 2, 2)

    gm = import_model(Padded().eval(), torch.randn(2, 2, 1))
    assert all(node.meta["origin"] for node in gm.graph.nodes if node.op == "call_function")


def test_the_model_is_left_as_it_is():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5)).eval()
    model[0].register_forward_hook(lambda *_: None)
    before = state_hash(model)
    gm = import_model(model, torch.randn(1, 1, 5, 5))
    for buffer in gm.buffers():
        buffer.zero_()
    assert state_hash(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_programs_and_files(tmp_path):
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), torch.randn(2, 4)
    program = torch.export.export(model, (x,))
    path = tmp_path / "model.pt2"
    torch.export.save(program, path)
    for source in (program, path, str(path)):
        gm = import_model(source)
        torch.testing.assert_close(gm(x)[0], model(x))


def test_open_dimensions_of_a_program():
    model, x = nn.Linear(4, 3).eval(), torch.randn(2, 4)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    with pytest.raises(ModelError, match=r"leaves dimensions open: input: \(s\d+, 4\)"):
        import_model(program)
    gm = import_model(program, torch.zeros(5, 4))
    assert tuple(gm.graph.output_node().args[0][0].meta["val"].shape) == (5, 3)


def message(error_type, model, inputs=None):
    with pytest.raises(error_type) as caught:
        import_model(model, inputs)
    return str(caught.value)


def test_training_mode():
    text = message(ModelError, nn.Sequential(nn.Linear(2, 2), nn.Dropout()), torch.zeros(1, 2))
    assert "in training mode (3 submodules: Sequential, 0, 1)" in text
    assert "call model.eval()" in text


def test_missing_and_wrong_inputs():
    model = Named().eval()
    assert "needs example inputs" in message(InputError, model)
    assert "forward takes (ids, scale, bias=None)" in message(InputError, model)
    assert "too many positional" in message(InputError, model, (1, 2, 3, 4))
    text = message(InputError, model, {"idz": np.array([1]), "scale": np.float32(1)})
    assert "no input 'idz'" in text
    assert "the input 'ids' is missing" in text
    assert "did you mean 'ids'" in text
    text = message(InputError, nn.Linear(4, 3).eval(), torch.zeros(2, 5))
    assert "the model itself fails on the example inputs" in text
    assert "float32(2, 5)" in text
    text = message(InputError, nn.Linear(4, 3).eval(), np.zeros((2, 4)))
    assert "float64(2, 4)" in text
    assert "example inputs are a str" in message(InputError, model, "x")


def test_inputs_that_do_not_fit_a_program():
    program = torch.export.export(nn.Linear(4, 3).eval(), (torch.zeros(2, 4),))
    assert "shape (3, 4), the model was exported for (2, 4)" in message(
        InputError, program, torch.zeros(3, 4)
    )
    assert "dtype float64" in message(InputError, program, torch.zeros(2, 4).double())


class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # the branch
            return x + 1
        return x


def test_data_dependent_control_flow(capfd):
    text = message(ModelError, Branching().eval(), torch.zeros(2))
    assert capfd.readouterr() == ("", ""), "torch prints what it has seen of the model"
    assert "depends on the values of its tensors" in text
    assert "test_torch_import.py:" in text
    assert "if x.sum() > 0" in text
    assert "torch.where" in text


@pytest.mark.parametrize(
    "function",
    [lambda x: x[x > 0], lambda x: torch.nonzero(x), lambda x: x * int(x.sum())],
)
def test_data_dependent_sizes_and_numbers(function):
    text = message(ModelError, Function(function), torch.ones(3))
    assert "depends on the values" in text
    assert "test_torch_import.py:" in text


def test_where_sizes_begin_to_depend_on_values():
    def function(x):
        rows = x.nonzero().float()
        return rows.exp().sum(0) * rows.shape[0]

    text = message(ModelError, Function(function), torch.ones(3))
    assert "the size or a number in aten.nonzero.default depends on the values" in text


def test_operators_of_other_libraries():
    @torch.library.custom_op("graphopt_test::halved", mutates_args=())
    def halved(x: torch.Tensor) -> torch.Tensor:
        return x / 2

    halved.register_fake(torch.empty_like)
    text = message(UnsupportedError, Function(lambda x: halved(x) + 1), torch.ones(3))
    assert "graphopt_test.halved.default" in text
    assert "test_torch_import.py:" in text
    assert "PyTorch's own operators" in text


def test_checks_of_values_are_left_out():
    """And what is computed for them, or for nothing."""

    def checked(x):
        total = x.sum().item()
        torch._check(total > 0)
        torch._check_tensor_all(x < 9)
        x.nonzero()
        return x * 2

    gm = import_model(Function(checked), (torch.ones(3),))
    assert targets(gm) == [aten.mul.Tensor]
    check_form(gm)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count += 1
        return x + self.count


def test_changed_state():
    model = Counting().eval()
    text = message(ModelError, model, torch.zeros(2))
    assert "changes 'count' in forward" in text
    assert "return its new value as an output" in text
    assert model.count.item() == 0


def test_programs_exported_in_training_mode():
    program = torch.export.export(nn.Dropout(0.5), (torch.zeros(4),))
    assert "exported in training mode" in message(ModelError, program)


def test_results_that_are_not_tensors():
    class Tuple(nn.Module):
        def forward(self, x):
            return x, 3, None

    assert "Python values besides tensors" in message(ModelError, Tuple().eval(), torch.ones(1))


def test_untraceable():
    def outside(x):
        return torch.from_numpy(x.numpy() + 1)

    text = message(ModelError, Function(outside), torch.ones(2))
    assert "cannot trace the model" in text
    assert "test_torch_import.py:" in text


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("model.pt2", b"junk", "is not a readable .pt2 file"),
        ("model.pth", b"junk", "holds weights or TorchScript"),
        ("model.bin", b"junk", "unknown suffix '.bin'"),
        ("model", b"junk", "unknown suffix '(none)'"),
    ],
)
def test_files_that_are_not_models(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert expected in message(ModelError, tmp_path / name)


def test_missing_files_and_other_objects(tmp_path):
    (tmp_path / "resnet50.onnx").write_bytes(b"")
    text = message(ModelError, tmp_path / "resnet5O.onnx")
    assert "there is no file" in text
    assert "did you mean resnet50.onnx" in text
    assert "is a folder" in message(ModelError, tmp_path)
    assert "cannot import a builtins.int" in message(ModelError, 3)


def test_torch_users_never_import_onnx():
    import subprocess
    import sys

    program = (
        "import sys, torch; from graphopt.importers import import_model;"
        "import_model(torch.nn.Linear(2, 2).eval(), torch.zeros(1, 2));"
        "assert not {'onnx', 'onnx_graphsurgeon'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
