"""One function per system: it loads a model and returns a function that runs it once.

Each takes (source, inputs, threads) and gives a function from nothing to the outputs as numpy
arrays, in the model's order. They run in `worker.py`'s process, in a Python of their own, and so
import their system inside; all compute in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]
Run = Callable[[], Sequence[np.ndarray]]


def graphopt(folder: str, inputs: Arrays, threads: int) -> Run:
    """A folder that graphopt built."""
    from graphopt.runtime.load import load

    model = load(folder, threads)
    arrays = list(inputs.values())

    def run() -> Sequence[np.ndarray]:
        result = model(*arrays)
        return result if isinstance(result, tuple) else (result,)

    return run


def onnxruntime(path: str, inputs: Arrays, threads: int) -> Run:
    """An ONNX file in ONNX Runtime with all its optimizations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # Errors only.
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)


def openvino(path: str, inputs: Arrays, threads: int) -> Run:
    """An ONNX file in OpenVINO, tuned for latency; nothing is copied on the way in or out."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape({name: array.shape for name, array in inputs.items()})
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    request = compiled.create_infer_request()
    outputs = compiled.outputs

    def run() -> Sequence[np.ndarray]:
        result = request.infer(inputs, share_inputs=True, share_outputs=True)
        return [result[output] for output in outputs]

    return run


def mnn(path: str, inputs: Arrays, threads: int) -> Run:
    """An .mnn file (see `peers/convert.py`) in MNN."""
    import MNN

    types = {
        "float32": MNN.Halide_Type_Float,
        "int32": MNN.Halide_Type_Int,
        "int64": MNN.Halide_Type_Int,
    }
    interpreter = MNN.Interpreter(path)
    session = interpreter.createSession(
        {"backend": "CPU", "precision": "high", "numThread": threads}
    )
    places = interpreter.getSessionInputAll(session)
    for name, array in inputs.items():
        interpreter.resizeTensor(places[name], array.shape)
    interpreter.resizeSession(session)
    feeds = []
    for name, array in inputs.items():
        narrow = array.astype(np.int32) if array.dtype == np.int64 else array
        kind = MNN.Tensor_DimensionType_Caffe
        tensor = MNN.Tensor(array.shape, types[array.dtype.name], narrow, kind)
        feeds.append((places[name], tensor))
    results = interpreter.getSessionOutputAll(session)

    def run() -> Sequence[np.ndarray]:
        for place, tensor in feeds:
            place.copyFrom(tensor)
        interpreter.runSession(session)
        arrays = []
        for result in results.values():
            shape = result.getShape()
            host = np.empty(shape, np.float32)
            kind = MNN.Tensor_DimensionType_Caffe
            copy = MNN.Tensor(shape, MNN.Halide_Type_Float, host, kind)
            result.copyToHostTensor(copy)
            arrays.append(np.array(copy.getNumpyData()))
        return arrays

    return run


def ncnn(path: str, inputs: Arrays, threads: int) -> Run:
    """A pair .ncnn.param and .ncnn.bin, made by pnnx (see `peers/convert.py`), in ncnn.

    pnnx leaves out the batch of one, calls inputs in0, in1 … and makes int64 ones int32.
    """
    import ncnn

    kinds = {line.split()[0] for line in Path(path).read_text().splitlines()[2:]}
    unknown = sorted(kind for kind in kinds if ncnn.layer_to_index(kind) < 0)
    if unknown:
        raise RuntimeError(f"pnnx left operators that ncnn has no layer for: {', '.join(unknown)}")
    net = ncnn.Net()
    net.opt.num_threads = threads
    net.opt.use_winograd_convolution = True
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_packed = net.opt.use_bf16_storage = False
    if net.load_param(path) or net.load_model(str(Path(path).with_suffix(".bin"))):
        raise RuntimeError(f"ncnn cannot load {Path(path).name}")
    feeds = []
    for array in inputs.values():
        narrow = array.astype(np.int32) if array.dtype == np.int64 else array
        feeds.append(ncnn.Mat(np.ascontiguousarray(narrow[0])).clone())
    names = net.output_names()

    def run() -> Sequence[np.ndarray]:
        extractor = net.create_extractor()
        for number, feed in enumerate(feeds):
            extractor.input(f"in{number}", feed)
        arrays = []
        for name in names:
            status, mat = extractor.extract(name)
            if status:
                raise RuntimeError(f"ncnn fails to compute {name}: {status}")
            arrays.append(np.array(mat)[None])
        return arrays

    return run


def torch_compile(name: str, inputs: Arrays, threads: int) -> Run:
    """One of the exported models in PyTorch, compiled by Inductor with its weights frozen."""
    import torch
    from torch._inductor import config

    from bench.peers.export import build

    torch.set_num_threads(threads)
    config.freezing = True
    compiled = torch.compile(build(name))
    tensors = [torch.from_numpy(array) for array in inputs.values()]

    def run() -> Sequence[np.ndarray]:
        with torch.inference_mode():
            return [compiled(*tensors).numpy()]

    return run


def nothing(source: str, inputs: Arrays, threads: int) -> Run:
    """No system and no model: what is measured then is Python's own."""
    return lambda: []


def torch_eager(name: str, inputs: Arrays, threads: int) -> Run:
    """A model of the zoo in PyTorch as it is."""
    import torch

    from tests.models import zoo

    torch.set_num_threads(threads)
    model = zoo.MODELS[name].model()
    tensors = [torch.from_numpy(array) for array in inputs.values()]

    def run() -> Sequence[np.ndarray]:
        with torch.inference_mode():
            return [model(*tensors).numpy()]

    return run
