"""Converts an ONNX file for MNN; runs in the peers' own environment.

    python bench/peers/convert_mnn.py MODEL.onnx MODEL.mnn

It calls MNN's converter itself: the command that comes with it (`mnnconvert`) would install a
package with pip, wherever pip is, and send statistics home.
"""

from __future__ import annotations

import sys

import _tools  # MNN's converter, a compiled module.


def main() -> None:
    source, target = sys.argv[1:]
    arguments = ["--framework", "ONNX", "--modelFile", source, "--MNNModel", target]
    if not _tools.mnnconvert(["MNNConvert", *arguments, "--bizCode", "graphopt"]):
        raise SystemExit(f"MNN cannot convert {source}")


if __name__ == "__main__":
    main()
