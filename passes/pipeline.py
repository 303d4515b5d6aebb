"""The passes there are, and the order they run in."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from graphopt.errors import GraphoptError
from graphopt.passes.base import Pass
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.crop_kernel import CropKernel
from graphopt.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from graphopt.passes.eliminate_dead_code import EliminateDeadCode
from graphopt.passes.fold_affine import FoldAffine
from graphopt.passes.fold_batch_norm import FoldBatchNorm
from graphopt.passes.fold_constants import FoldConstants
from graphopt.passes.fold_pad import FoldPad
from graphopt.passes.fuse_activation import FuseActivation
from graphopt.passes.fuse_attention import FuseAttention
from graphopt.passes.fuse_gelu import FuseGelu
from graphopt.passes.fuse_layer_norm import FuseLayerNorm
from graphopt.passes.hoist_weight_scales import HoistWeightScales
from graphopt.passes.merge_siblings import MergeSiblings
from graphopt.passes.multiply_computed_weights import MultiplyComputedWeights
from graphopt.passes.read_causal_masks import ReadCausalMasks
from graphopt.passes.simplify import Simplify
from graphopt.passes.split_group_norm import SplitGroupNorm


def default_pipeline() -> list[Pass]:
    """What `graphopt.compile` runs unless told otherwise."""
    return [
        Canonicalize(),
        FoldConstants(),
        # Indices that are computed from sizes are constants only now.
        Canonicalize(),
        Simplify(),
        EliminateCommonSubexpressions(),
        # Before constants move into weights: these are recognized by their constants.
        FuseGelu(),
        FuseActivation(),
        FuseLayerNorm(),
        FuseAttention(),
        HoistWeightScales(),
        FoldBatchNorm(),
        FoldAffine(),
        # A normalization between padding and a layer is gone only now.
        FoldPad(),
        CropKernel(),
        # The folds leave products of constants, and layers that are equal only now.
        FoldConstants(),
        # What is no constant by now is computed in each run.
        MultiplyComputedWeights(),
        ReadCausalMasks(),
        SplitGroupNorm(),
        Simplify(),
        EliminateCommonSubexpressions(),
        EliminateDeadCode(),
    ]


def optional_passes() -> list[Pass]:
    """What runs only where it is asked for."""
    return [MergeSiblings()]


def all_passes() -> list[Pass]:
    """Every pass once, with its default options, in the order of the default pipeline."""
    passes = [*default_pipeline(), *optional_passes()]
    return list({each.name: each for each in passes}.values())


def resolve(passes: Sequence[str | Pass] | None) -> list[Pass]:
    """The passes that are meant: the default pipeline for None, else each by name or as given.

    Raises:
        GraphoptError: there is no pass of such a name.
    """
    if passes is None:
        return default_pipeline()
    known = {each.name: each for each in all_passes()}
    resolved: list[Pass] = []
    for each in passes:
        if isinstance(each, Pass):
            resolved.append(each)
        elif isinstance(each, str) and each in known:
            resolved.append(known[each])
        else:
            near = difflib.get_close_matches(str(each), known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
            raise GraphoptError(f"there is no pass {each!r}", hint=hint)
    return resolved
