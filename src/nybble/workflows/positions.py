"""--keep_positions: where weights lie between their codes, kept in quantized/ so that --init_from trains on from there.

fixed    4 bits a weight, in code units (quant/position.py)
exact    the weight before rounding, in the dtype of the model
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.compression.init import QuantizedInit
from nybble.models.positions_file import position_layout
from nybble.models.quantized_file import LazyMapping
from nybble.options.compression import KeepPositions
from nybble.qat.base import QuantizedLinear
from nybble.qat.fake_quant_linear import FakeQuantizedLinear
from nybble.quant.grid import to_groups
from nybble.quant.position import pack_positions
from nybble.workflows.steps import CompressedModel, RunContext


def compressed_positions(context: RunContext, compressed: CompressedModel) -> Mapping[str, Tensor]:
    """Positions of the linear layers as they were compressed, for `save_positions`; none where none are to be kept.

    Those of a model on disk are computed at each access.
    """
    keep, inits = _kept(context, compressed), compressed.inits
    if keep == "none":
        return {}

    def position(name: str) -> Tensor:
        weight_OI = inits[name].weight_OI
        if keep == "exact":
            return weight_OI.cpu()
        return pack_positions(weight_OI, compressed.weights[name].to(weight_OI.device)).cpu()

    if isinstance(inits, dict):
        return {name: position(name) for name in inits}
    model = context.loaded.model
    layers = {name: model.get_submodule(name) for name in inits}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    layouts = {name: position_layout(shape, model.dtype, keep == "exact") for name, shape in shapes.items()}
    return LazyMapping(inits, position, layouts)


def _kept(context: RunContext, compressed: CompressedModel) -> KeepPositions:
    """What is kept: nothing where the weights come from a run that has no positions."""
    return context.calibration.keep_positions if compressed.has_positions else "none"


@dataclass(frozen=True)
class TrainedPositions:
    """What is needed to know the positions after a training.

    Attributes:
        keep: what is kept.
        start: layer name -> positions before the training, of layers whose codes stay.
        scales: layer name -> scales before the training, of the same layers.
    """

    keep: KeepPositions
    start: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]

    @staticmethod
    def of(context: RunContext, compressed: CompressedModel, codes_stay: bool) -> TrainedPositions:
        """Before the training. Where codes stay, the weights before rounding are released.

        Args:
            compressed: loses its inits where codes stay.
        """
        if not codes_stay:  # they follow from what was trained, whatever it started from
            return TrainedPositions(context.calibration.keep_positions, {}, {})
        keep = _kept(context, compressed)
        start = compressed_positions(context, compressed)
        scales = {name: compressed.weights[name].scale_OG for name in start}
        compressed.release_inits()
        return TrainedPositions(keep, start, scales)

    @torch.no_grad()
    def after(self, name: str, layer: QuantizedLinear) -> dict[str, Tensor]:
        """Positions of a trained layer by its name, for `save_positions`; empty where none are kept."""
        return {} if self.keep == "none" else {name: self._of_layer(name, layer)}

    def _of_layer(self, name: str, layer: QuantizedLinear) -> Tensor:
        quantized = layer.absorb()
        if not isinstance(layer, FakeQuantizedLinear):
            if self.keep == "fixed":
                return self.start[name]  # the code stays, and so does the position in code units
            factor_OG1 = (quantized.scale_OG.cpu() / self.scales[name])[..., None]
            start_OGK = to_groups(self.start[name].cpu().float(), factor_OG1.shape[1])
            weight_OI = (start_OGK * factor_OG1).flatten(-2)
            return QuantizedInit.with_codes(quantized.to("cpu"), weight_OI, layer.dtype).weight_OI
        weight_OI = layer.latent_OI()
        if self.keep == "fixed":
            return pack_positions(weight_OI, quantized).cpu()
        return QuantizedInit.with_codes(quantized, weight_OI, layer.dtype).weight_OI.cpu()
