"""Kernel generators by operator: for each anchor, the generators in order of preference."""

from __future__ import annotations

from graphopt.backends.kernels.base import Generator
from graphopt.backends.kernels.conv import lower_depthwise, lower_products
from graphopt.backends.kernels.conv_fold import lower_fold
from graphopt.backends.kernels.expand import lower_expand
from graphopt.backends.kernels.grid_sample import lower_grid_sample
from graphopt.backends.kernels.linear import lower_linear
from graphopt.backends.kernels.matmul import lower_attention, lower_matmul
from graphopt.backends.kernels.order import lower_order
from graphopt.backends.kernels.pool import lower_pool
from graphopt.backends.kernels.recurrent import lower_recurrent
from graphopt.backends.kernels.resize import lower_resize
from graphopt.backends.kernels.rows import lower_layer_norm, lower_softmax
from graphopt.backends.kernels.scan import lower_scan
from graphopt.backends.kernels.scatter import lower_scatter
from graphopt.backends.kernels.transposed import lower_transposed

GENERATOR_VERSION = 14
"""To be raised when kernels get faster or slower: what was tuned before then no longer counts."""

GENERATORS: dict[str, tuple[Generator, ...]] = {
    "convolution": (lower_expand, lower_depthwise, lower_products, lower_transposed, lower_fold),
    "linear": (lower_linear,),
    "matmul": (lower_linear, lower_matmul),
    "softmax": (lower_softmax,),
    "log_softmax": (lower_softmax,),
    "layer_norm": (lower_layer_norm,),
    "attention": (lower_attention,),
    "upsample_linear": (lower_resize,),
    "lstm": (lower_recurrent,),
    "gru": (lower_recurrent,),
    "rnn": (lower_recurrent,),
    "cumsum": (lower_scan,),
    "cumprod": (lower_scan,),
    "grid_sample": (lower_grid_sample,),
    "scatter": (lower_scatter,),
    "scatter_reduce": (lower_scatter,),
    "index_copy": (lower_scatter,),
    "index_add": (lower_scatter,),
    "order": (lower_order,),
    "max_pool2d": (lower_pool,),
    "avg_pool2d": (lower_pool,),
    "max_pool3d": (lower_pool,),
    "avg_pool3d": (lower_pool,),
}
