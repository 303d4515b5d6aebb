"""Makes all that the comparison with the peers needs, where it is missing: `make peers`.

python bench/peers/prepare.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import onnx_models
from bench.peers import convert, environment


def convert_models() -> None:
    """Convert what has been exported; what a peer refuses is said, and remembered."""
    for name in onnx_models.EXPORTED:
        model = onnx_models.find(name)
        for to_file in (convert.mnn_file, convert.ncnn_file):
            try:
                to_file(model)
            except convert.ConversionError as error:
                print(f"{name}: {to_file.__name__}: {error}")


def main() -> None:
    environment.make_environment()
    environment.export_models()
    convert_models()


if __name__ == "__main__":
    main()
