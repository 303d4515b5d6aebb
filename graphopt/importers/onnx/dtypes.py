"""ONNX element types as torch's."""

from __future__ import annotations

import numpy as np
import onnx
import torch

from graphopt.importers.onnx.values import Refused

_DTYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.UINT16: torch.uint16,
    onnx.TensorProto.UINT32: torch.uint32,
    onnx.TensorProto.UINT64: torch.uint64,
    onnx.TensorProto.BOOL: torch.bool,
}


def torch_dtype(element_type: int | np.dtype[np.generic] | type) -> torch.dtype:
    """The torch type of an ONNX element type, given as its number or as numpy's.

    Raises:
        Refused: torch has no such type (strings, 4-bit and 8-bit floats).
    """
    if not isinstance(element_type, int):
        element_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(element_type))
    found = _DTYPES.get(element_type)
    if found is None:
        name = onnx.TensorProto.DataType.Name(element_type)
        raise Refused(f"the element type {name} has no counterpart")
    return found


def to_torch(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> torch.Tensor:
    """A numpy array, also of numpy's extension types, as a tensor of its own memory."""
    kind = torch_dtype(array.dtype)
    if kind == torch.bfloat16:
        return torch.from_numpy(array.astype(np.float32)).to(kind)
    return torch.from_numpy(np.array(array, order="C"))
