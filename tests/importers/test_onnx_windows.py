"""Convolutions and pools of any geometry, slices, pads and resizes, against ONNX Runtime."""

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import helper

from graphopt.errors import UnsupportedError
from tests.importers.onnx_cases import assert_same, floats, graph_model, ints, one_node

SETTINGS = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
AUTO_PAD = st.sampled_from(["NOTSET", "NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"])


@st.composite
def windows(draw, dimensions, *, largest_pad=2, dilated=True):
    sizes = [draw(st.integers(4, 11)) for _ in range(dimensions)]
    kernel = [draw(st.integers(1, 4)) for _ in range(dimensions)]
    attributes = {
        "kernel_shape": kernel,
        "strides": [draw(st.integers(1, 3)) for _ in range(dimensions)],
    }
    if dilated:
        attributes["dilations"] = [draw(st.integers(1, 2)) for _ in range(dimensions)]
    mode = draw(AUTO_PAD)
    if mode.startswith("SAME"):
        # ONNX Runtime knows neither dilations nor windows smaller than the stride here.
        attributes.pop("dilations", None)
        attributes["strides"] = [
            min(stride, k) for stride, k in zip(attributes["strides"], kernel, strict=True)
        ]
    if mode == "NOTSET":
        attributes["pads"] = [
            draw(st.integers(0, min(largest_pad, k - 1))) for k in [*kernel, *kernel]
        ]
    else:
        attributes["auto_pad"] = mode
    spans = [
        (k - 1) * d + 1
        for k, d in zip(kernel, attributes.get("dilations", [1] * dimensions), strict=True)
    ]
    assume(all(span <= size for span, size in zip(spans, sizes, strict=True)))
    return sizes, attributes


@SETTINGS
@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_conv(data, dimensions, group, bias):
    sizes, attributes = data.draw(windows(dimensions))
    x = floats(2, 2 * group, *sizes)
    weights = {"w": floats(3 * group, 2, *attributes["kernel_shape"], seed=1)}
    if bias:
        weights["b"] = floats(3 * group, seed=2)
    assert_same(one_node("Conv", {"x": x}, weights, group=group, **attributes), {"x": x})


@SETTINGS
@given(st.data(), st.integers(1, 2), st.integers(1, 2), st.booleans())
def test_conv_transpose(data, dimensions, group, bias):
    sizes, attributes = data.draw(windows(dimensions))
    attributes["output_padding"] = [
        data.draw(st.integers(0, stride - 1)) for stride in attributes["strides"]
    ]
    x = floats(1, 2 * group, *sizes)
    weights = {"w": floats(2 * group, 3, *attributes["kernel_shape"], seed=1)}
    if bias:
        weights["b"] = floats(3 * group, seed=2)
    model = one_node("ConvTranspose", {"x": x}, weights, group=group, **attributes)
    assert_same(model, {"x": x})


@SETTINGS
@given(st.data(), st.integers(1, 2), st.booleans())
def test_max_pool(data, dimensions, ceil):
    sizes, attributes = data.draw(windows(dimensions))
    x = floats(1, 3, *sizes) - 5  # all negative: a zero of the padding would win
    assert_same(one_node("MaxPool", {"x": x}, ceil_mode=int(ceil), **attributes), {"x": x})


@SETTINGS
@given(st.data(), st.integers(1, 2), st.booleans(), st.booleans())
def test_average_pool(data, dimensions, ceil, count_pad):
    sizes, attributes = data.draw(windows(dimensions, dilated=False))
    x = floats(1, 3, *sizes) + 3
    model = one_node(
        "AveragePool",
        {"x": x},
        ceil_mode=int(ceil),
        count_include_pad=int(count_pad),
        opset=19,
        **attributes,
    )
    assert_same(model, {"x": x})


@SETTINGS
@given(st.data(), st.sampled_from([9, 13]))
def test_slice(data, opset):
    x = floats(5, 6, 7)
    axes = data.draw(st.lists(st.integers(0, 2), unique=True, min_size=1))
    bound = st.one_of(st.integers(-9, 9), st.sampled_from([2**31 - 1, -(2**31)]))
    starts = [data.draw(bound) for _ in axes]
    ends = [data.draw(bound) for _ in axes]
    if opset < 10:
        model = one_node("Slice", {"x": x}, opset=opset, axes=axes, starts=starts, ends=ends)
    else:
        steps = [data.draw(st.sampled_from([1, 2, 3, -1, -2])) for _ in axes]
        # Backwards to INT_MAX is empty by the specification; ONNX Runtime gives one element.
        assume(not any(t < 0 and end == 2**31 - 1 for t, end in zip(steps, ends, strict=True)))
        signed = [axis - 3 if data.draw(st.booleans()) else axis for axis in axes]
        bounds = {"s": ints(*starts), "e": ints(*ends), "a": ints(*signed), "t": ints(*steps)}
        model = one_node("Slice", {"x": x}, bounds, opset=opset)
    assert_same(model, {"x": x}, 0)


@SETTINGS
@given(st.data(), st.sampled_from(["constant", "reflect", "edge", "wrap"]))
def test_pad(data, mode):
    x = floats(3, 4, 5)
    lowest = -2 if mode == "constant" else 0
    pads = [data.draw(st.integers(lowest, 2)) for _ in range(6)]
    constants = {"p": ints(*pads)}
    if mode == "constant":
        constants["v"] = np.array(1.5, np.float32)
    assert_same(one_node("Pad", {"x": x}, constants, opset=19, mode=mode), {"x": x}, 0)


COORDINATES = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]


@SETTINGS
@given(
    st.sampled_from(["nearest", "linear", "cubic"]),
    st.sampled_from([*COORDINATES, "half_pixel_symmetric"]),
    st.sampled_from(["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]),
    st.tuples(st.integers(1, 13), st.integers(1, 13)),
)
def test_resize_to_sizes(mode, coordinates, rounding, output):
    x = floats(2, 3, 5, 6)
    model = one_node(
        "Resize",
        {"x": x},
        {"sizes": ints(2, 3, *output)},
        order=["x", "", "", "sizes"],
        opset=19,
        mode=mode,
        coordinate_transformation_mode=coordinates,
        nearest_mode=rounding,
    )
    assert_same(model, {"x": x}, 2e-5)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("opset", [10, 11, 13])
@pytest.mark.parametrize("scale", [0.5, 1.6, 2.0, 2.5, 3.0])
def test_resize_by_scales(mode, opset, scale):
    x = floats(1, 2, 5, 6)
    scales = {"scales": np.array([1, 1, scale, 2 * scale], np.float32)}
    if opset >= 11:
        scales = {"roi": np.zeros(0, np.float32), **scales}
    model = one_node("Resize", {"x": x}, scales, opset=opset, mode=mode)
    assert_same(model, {"x": x}, 2e-5)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize_by_scales_that_do_not_divide(mode):
    x = floats(1, 1, 4, 5)
    model = one_node(
        "Resize",
        {"x": x},
        {"scales": np.array([1, 1, 0.6, 1.7], np.float32)},
        order=["x", "", "scales"],
        mode=mode,
        coordinate_transformation_mode="align_corners",
    )
    assert_same(model, {"x": x}, 2e-5)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_upsample(mode):
    x = floats(1, 2, 5, 6)
    scales = {"scales": np.array([1, 1, 2, 3], np.float32)}
    assert_same(one_node("Upsample", {"x": x}, scales, opset=9, mode=mode), {"x": x})


def test_resize_of_one_axis_and_of_sequences():
    for shape, sizes in [((2, 3, 8), (2, 3, 11)), ((2, 3, 4, 5), (2, 6, 4, 5))]:
        x = floats(*shape)
        constants = {"sizes": ints(*sizes)}
        model = one_node("Resize", {"x": x}, constants, order=["x", "", "", "sizes"], mode="linear")
        assert_same(model, {"x": x}, 2e-5)


def test_resize_refuses_by_attribute():
    x = floats(1, 1, 4, 4)
    model = one_node(
        "Resize",
        {"x": x},
        {"sizes": ints(1, 1, 2, 2)},
        order=["x", "", "", "sizes"],
        mode="linear",
        antialias=1,
    )
    with pytest.raises(UnsupportedError, match="antialias = 1"):
        assert_same(model, {"x": x})


@pytest.mark.parametrize("mode", ["NOTSET", "SAME_UPPER", "SAME_LOWER"])
def test_conv_transpose_output_shape(mode):
    x = floats(1, 2, 4, 5)
    weights = {"w": floats(2, 3, 3, 4, seed=1)}
    model = one_node(
        "ConvTranspose",
        {"x": x},
        weights,
        strides=[2, 2],
        output_shape=[8, 9],
        auto_pad=mode,
    )
    assert_same(model, {"x": x})


@SETTINGS
@given(st.data())
def test_col2im(data):
    sizes, attributes = data.draw(windows(2))
    assume("auto_pad" not in attributes)
    kernel = attributes.pop("kernel_shape")
    pads = attributes["pads"]
    counts = [
        (size + pads[i] + pads[i + 2] - (k - 1) * dilation - 1) // stride + 1
        for i, (size, k, dilation, stride) in enumerate(
            zip(sizes, kernel, attributes["dilations"], attributes["strides"], strict=True)
        )
    ]
    x = floats(2, 3 * kernel[0] * kernel[1], counts[0] * counts[1])
    constants = {"sizes": ints(*sizes), "kernel": ints(*kernel)}
    model = one_node("Col2Im", {"x": x}, constants, **attributes)
    assert_same(model, {"x": x})


@SETTINGS
@given(st.data(), st.integers(1, 3))
def test_places_of_the_largest(data, dimensions):
    sizes, attributes = data.draw(windows(dimensions))
    # Few values, so that many are equal.
    x = np.round(floats(2, 3, *sizes) * 2)
    model = one_node("MaxPool", {"x": x}, outputs=2, **attributes)
    assert_same(model, {"x": x}, 0)


@pytest.mark.parametrize("given_size", [True, False])
@pytest.mark.parametrize(("shape", "step"), [((1, 2, 6, 8), 2), ((2, 3, 9), 3)])
def test_unpooling(shape, step, given_size):
    dimensions = len(shape) - 2
    attributes = {"kernel_shape": [step] * dimensions, "strides": [step] * dimensions}
    nodes = [
        helper.make_node("MaxPool", ["x"], ["v", "i"], **attributes),
        helper.make_node("MaxUnpool", ["v", "i", *["s"] * given_size], ["y"], **attributes),
    ]
    sizes = {"s": ints(*shape[:-1], shape[-1] + 1)} if given_size else {}
    model = graph_model(nodes, {"x": floats(*shape)}, sizes, ["y"], 18)
    assert_same(model, {"x": floats(*shape)}, 0)
