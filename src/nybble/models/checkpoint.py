"""QuantizedCheckpoint: a folder quantized/ that is read tensor by tensor, for models that are larger than the memory.

The model that it builds has no weights in its quantized layers. Each of them reads its weight from the file, and
dequantizes it, whenever it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nybble.models.composite import auto_class
from nybble.models.linearize import linearize
from nybble.models.quantized_file import WeightsLayout, open_weights, read_layout
from nybble.models.quantized_model import check_layout, load_config, load_tokenizer
from nybble.models.selection import LayerSelection, select_layers
from nybble.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A quantized model whose tensors stay in the file.

    Attributes:
        folder: quantized/ of a run.
        config: transformers configuration.
        tokenizer: transformers tokenizer.
        quantized: module name -> quantized weight, read at each access.
        shapes: module name -> [O, I] of its quantized weight.
        others: name -> every other tensor, in its own dtype, read at each access.
        selection: which modules are quantized, their schemes, and whether the head is tied to the embedding.
        num_parameters: of the model; a tied head counts once.
        trust_remote_code: whether to run Python code that comes with the model.
    """

    folder: Path
    config: Any
    tokenizer: Any
    quantized: Mapping[str, QuantizedWeight]
    shapes: Mapping[str, tuple[int, int]]
    others: Mapping[str, Tensor]
    selection: LayerSelection
    num_parameters: int
    trust_remote_code: bool

    def build(self, weight_of: Callable[[str], Tensor] | None = None) -> Any:
        """Build the model in float32.

        Args:
            weight_of: module name -> weight [O, I] that the quantized module computes with, called at each use. None
                dequantizes the codes in the file.

        Returns:
            A transformers.PreTrainedModel on the CPU, in evaluation mode, frozen. Its quantized modules have no
            parameter; their attribute `weight` calls `weight_of`.
        """
        model = empty_model(self.config, self.trust_remote_code)
        others = {
            name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in self.others.items()
        }
        model.load_state_dict(others, strict=False, assign=True)
        read = weight_of or (lambda name: self.quantized[name].dequantize())
        for name in self.quantized:
            _compute_weight(model.get_submodule(name), name, read)
        if self.selection.tied and not self.selection.embeddings:
            model.tie_weights()
        elif self.selection.tied:
            _compute_weight(model.get_output_embeddings(), self.selection.embeddings[0], read)
        return model.requires_grad_(False).eval()


def open_checkpoint(folder: Path, trust_remote_code: bool = False) -> QuantizedCheckpoint:
    """Open a folder that `save_quantized` wrote, and check the header of its weights against its configuration.

    Args:
        folder: quantized/ of a run.
        trust_remote_code: whether to run Python code that comes with the model.

    Raises:
        RunError: the files are damaged or do not fit each other, nybble did not write them, or the model needs Python
            code that is not trusted.
    """
    config, layout = load_config(folder, trust_remote_code), read_layout(folder)
    model = check_layout(folder, config, layout, trust_remote_code)
    quantized, others = open_weights(folder)
    return QuantizedCheckpoint(
        folder=folder,
        config=config,
        tokenizer=load_tokenizer(folder, trust_remote_code),
        quantized=quantized,
        shapes={name: layer.shape for name, layer in layout.quantized.items()},
        others=others,
        selection=quantized_selection(select_layers(model), layout),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        trust_remote_code=trust_remote_code,
    )


def quantized_selection(everything: LayerSelection, layout: WeightsLayout) -> LayerSelection:
    """Return the layers that a file holds as codes, with their schemes.

    Args:
        everything: all layers that can be quantized.
        layout: header of the weights file.
    """
    schemes = {name: layer.scheme for name, layer in layout.quantized.items()}
    int4, int8 = (
        tuple(name for name in names if name in schemes) for names in (everything.linears, everything.embeddings)
    )
    return LayerSelection(int4, int8, everything.tied, schemes)


def empty_model(config: Any, trust_remote_code: bool) -> Any:
    """Build a model whose parameters have shapes but no memory. Buffers are real: they follow from the configuration.

    Args:
        config: transformers configuration.
        trust_remote_code: whether to run Python code that comes with the model.

    Returns:
        A transformers.PreTrainedModel after `linearize`; float32.
    """
    model = linearize(transformers_model(config, trust_remote_code))
    model.tie_weights()
    return model


def transformers_model(config: Any, trust_remote_code: bool) -> Any:
    """Build the same model as transformers has it, with stacked experts; see `empty_model`."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model


def _compute_weight(module: nn.Module, name: str, read: Callable[[str], Tensor]) -> None:
    """Replace the parameter `weight` of a module by an attribute that is computed at each access, in place."""
    kind = type(module)
    del module._parameters["weight"]
    module.__class__ = type(kind.__name__, (kind,), {"weight": property(lambda _: read(name)), "__module__": __name__})
