"""Random layers, calibrated blocks and toy methods for the tests of nybble.compress."""

import torch
from torch import Tensor, nn

from nybble.compression.base import ScaleMethod
from nybble.compression.blocks import DecoderBlocks
from nybble.compression.rtn import MinMaxScales
from nybble.models.selection import select_layers
from nybble.quant.grid import min_max_qparams, quantize_dequantize
from nybble.quant.scheme import QuantScheme

IDS = torch.randint(0, 255, (5, 16), generator=torch.Generator().manual_seed(0))


def random_layer(outputs: int, inputs: int, correlation: float = 1.0) -> tuple[Tensor, Tensor]:
    """A weight [O, I] and the second moments [I, I] of correlated inputs; float64.

    Args:
        outputs: O.
        inputs: I.
        correlation: size of the random part of the mixing matrix. 1: no identity part, strongly correlated inputs.
    """
    weight_OI = torch.randn(outputs, inputs, dtype=torch.float64)
    mixing_II = correlation * torch.randn(inputs, inputs, dtype=torch.float64)
    if correlation != 1.0:
        mixing_II = mixing_II + torch.eye(inputs, dtype=torch.float64)
    x_NI = torch.randn(200, inputs, dtype=torch.float64) @ mixing_II
    return weight_OI, x_NI.T @ x_NI / 200


def round_to_nearest(weight_OI: Tensor, scheme: QuantScheme) -> Tensor:
    """The weight [O, I] rounded to nearest."""
    return quantize_dequantize(weight_OI, *min_max_qparams(weight_OI, scheme), scheme)


def decoder_blocks(model: object, ids: Tensor = IDS, batch: int = 2, **options: object) -> DecoderBlocks:
    """The blocks of a tiny model, all of whose decoder layers get 4 bits."""
    return DecoderBlocks(model, select_layers(model).linears, ids, batch, **options)  # type: ignore[arg-type]


def break_chain(model: nn.Module) -> None:
    """Let block 1 give something else in each forward."""
    calls = [0]

    def drift(module: nn.Module, args: object, output: Tensor) -> Tensor:
        calls[0] += 1
        return output * calls[0]

    model.model.layers[1].register_forward_hook(drift)


class ShrunkRange(ScaleMethod):
    """A toy method that needs no text: the range of each group, shrunk to 90 %."""

    needs_calibration = False

    def search(self, weight_OI: Tensor, importance_I: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the shrunk range."""
        return min_max_qparams(0.9 * weight_OI, scheme)


class RecordingScales(MinMaxScales):
    """Round-to-nearest scales that record what they are asked."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.importances: list[Tensor] = []

    def search(self, weight_OI: Tensor, importance_I: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
        """Record the arguments."""
        self.weights.append(weight_OI.clone())
        self.importances.append(importance_I.clone())
        return super().search(weight_OI, importance_I, scheme)
