"""Decoder blocks that run one at a time, and the hidden states between them.

    hidden_0 = embedding(tokens)        hidden_{i+1} = block_i(hidden_i)

DecoderBlocks keeps up to two streams of hidden states for all calibration sequences, each as it is before one block:
`full` comes through the 16-bit blocks and, where blocks are trained on it, `quantized` comes through the blocks
compressed so far. A stream has S x T x D numbers on the CPU, in a temporary file if it is large (streamed.py);
inside a block there is one batch. On a GPU only one block is on the device, and the rest of the model is on the CPU.

The other arguments of a block (masks, rotary embeddings) are recorded in one forward of the whole model. Each block
must reproduce the model's own hidden states, and `check_chain` (chain.py) checks that the other arguments do not
depend on the tokens. So a family whose blocks exchange more than hidden states is an error and not a wrong result.

Statistics of the input x of a layer in the 16-bit model:        gram = mean over all tokens of x x^T

The statistics come from the 16-bit stream. Inputs that come through the compressed blocks gave no better models, and
they would need another pass.

Several processes divide the sequences, and add up the statistics. Where blocks are trained on the streams, each
process keeps all sequences and computes the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nybble import processes
from nybble.compression.chain import find_block_list, first_output, nonfinite_remedy, record_blocks
from nybble.errors import ModelError
from nybble.models.device import products_of_bfloat16
from nybble.models.layers_on_disk import layers_of
from nybble.models.streamed import new_stream
from nybble.quant.grid import at_least_float32

# With fewer tokens a layer is rounded to nearest. Only experts get that few.
MIN_TOKENS = 16

# With as many, second moments are taken as they are.
_MANY_TOKENS_PER_INPUT = 16


@dataclass(frozen=True)
class InputStatistics:
    """Second moments of the input that some layers share.

    Attributes:
        layers: names of the layers within the block.
        gram_II: sum of x x^T over the tokens that the layers were called with, divided by the number of all tokens;
            float32 (float64 for a float64 model). Folding changes it in place.
        tokens: how many tokens the layers were called with. Those of an expert are the ones that are routed to it.
    """

    layers: tuple[str, ...]
    gram_II: Tensor
    tokens: int

    def expected_II(self) -> Tensor:
        """Estimate of the second moments on other text: gram_II, shrunk towards its diagonal where tokens are few.

        A new tensor, which belongs to the caller.

            (N gram + I diagonal) / (N + I)        for N tokens and I input channels, if N < 16 I

        A method that fits correlations which few tokens have by chance is worse than round-to-nearest on others: for
        inputs of 1536 channels and 512 tokens, se+gptq has 1.4 times its output error without shrinking, and 0.65 times
        with it (SmolLM2, log of 2026-11-29). With more tokens it makes no difference.
        """
        inputs = len(self.gram_II)
        if self.tokens >= _MANY_TOKENS_PER_INPUT * inputs:
            return self.gram_II.clone()
        expected_II = self.gram_II * (self.tokens / (self.tokens + inputs))
        expected_II.diagonal().copy_(self.gram_II.diagonal())
        return expected_II


class DecoderBlocks:
    """The decoder blocks of a model and the streams of hidden states.

    Blocks run on the device that the model is on at first. Outside of `on_device`, which gives one block, they are on
    the CPU or on the disk (layers_on_disk.py).

    Args:
        model: a transformers model.
        names: paths of the layers that get 4 bits.
        input_ids: [S, T] token ids.
        batch: sequences in one forward.
        with_quantized: whether to keep the stream `quantized`.
        folder: folder for temporary files. None: the system's.

    Attributes:
        modules: the blocks.
        prefixes: path of each block in the model, with a dot at the end.
        layers: names within each block of its layers that get 4 bits.
        full, quantized: the streams [S, T, D] on the CPU, in the dtype of the model.

    Raises:
        ModelError: there is no list of blocks, or the blocks do not reproduce the model's own hidden states.
        RunError: the disk is full.
    """

    def __init__(
        self,
        model: Any,
        names: Sequence[str],
        input_ids: Tensor,
        batch: int,
        with_quantized: bool = True,
        folder: Path | None = None,
    ) -> None:
        self.model, self.batch = model, batch
        self._places = layers_of(model, find_block_list(model, names))
        self.device, self.dtype = self._places.device, model.dtype
        self.modules = self._places.modules
        self.prefixes = [self._places.prefix(i) for i in range(len(self.modules))]
        self.layers = [
            [name.removeprefix(prefix) for name in names if name.startswith(prefix)] for prefix in self.prefixes
        ]
        record = record_blocks(model, self.modules, input_ids[:1].to(self.device))
        self._arguments = record.arguments
        self._tokens, self._divided = input_ids.numel(), processes.count() > 1 and not with_quantized
        if self._divided:
            input_ids = input_ids[list(processes.share(len(input_ids)))]
        shape = (*input_ids.shape, record.hidden[0].shape[-1])
        self.full = new_stream(shape, self.dtype, folder)
        for part in self.batches():
            self.full[part] = self._first_inputs(input_ids[part].to(self.device)).cpu()
        self.quantized = new_stream(shape, self.dtype, folder).copy_(self.full) if with_quantized else None
        self._places.release(model)

    def on_device(self, i: int) -> AbstractContextManager[nn.Module]:
        """Keep block i on the device, with its weights, inside the context."""
        return self._places.loaded(i)

    def restore_model(self) -> None:
        """Bring the model back to where it was at first."""
        self._places.restore(self.model)

    def run(self, i: int, hidden_BTD: Tensor) -> Tensor:
        """Outputs of block i for a batch of hidden states; both are on the device."""
        args, kwargs = self._arguments[i]
        return first_output(self.modules[i](hidden_BTD, *args, **kwargs))

    def batches(self) -> Iterator[slice]:
        """Slices of the sequences, one for each forward."""
        return (slice(start, start + self.batch) for start in range(0, len(self.full), self.batch))

    @torch.no_grad()
    def advance_full(self, i: int) -> None:
        """Pass the full stream through block i, which must still be the 16-bit one."""
        for part in self.batches():
            self.full[part] = self.run(i, self.full[part].to(self.device)).cpu()

    @torch.no_grad()
    def advance_quantized(self, i: int) -> None:
        """Pass the quantized stream through block i with its present weights."""
        assert self.quantized is not None, "these blocks keep no quantized stream"
        for part in self.batches():
            self.quantized[part] = self.run(i, self.quantized[part].to(self.device)).cpu()

    @torch.no_grad()
    def observe(self, i: int) -> list[InputStatistics]:
        """Pass the full stream through block i, and collect statistics of the inputs of its layers.

        Returns:
            One entry for each group of layers that are called with the same tensor; none for an expert without tokens.

        Raises:
            ModelError: the inputs of a layer are not finite; the layer is named.
        """
        grams: dict[tuple[str, ...], Tensor] = {}
        seen: Counter[tuple[str, ...]] = Counter()
        for part in self.batches():
            with self._recorded_inputs(i) as inputs:
                output_BTD = self.run(i, self.full[part].to(self.device))
            for layers, x_NI in _group_by_tensor(inputs).items():
                if layers not in grams:
                    dtype, size = at_least_float32(x_NI[:0]).dtype, x_NI.shape[-1]
                    grams[layers] = x_NI.new_zeros(size, size, dtype=dtype)
                _add_lower(grams[layers], x_NI, 1 / self._tokens)
                seen[layers] += len(x_NI)
            # Only now: a block without a norm at its beginning (olmo2) records views of the stream.
            self.full[part] = output_BTD.cpu()
        if self._divided:
            grams, seen = self._add_up(grams, seen)
        for layers, gram_II in grams.items():
            if not bool(gram_II.isfinite().all()):
                raise ModelError(
                    f"the inputs of {self.prefixes[i]}{layers[0]} must be finite; they are not on this text; "
                    f"{nonfinite_remedy(self.dtype)}"
                )
        # One after the other: the statistics of an input can be larger than the weights of the block.
        return [InputStatistics(layers, _symmetric(grams.pop(layers)), seen[layers]) for layers in list(grams)]

    def _add_up(
        self, grams: dict[tuple[str, ...], Tensor], seen: Counter[tuple[str, ...]]
    ) -> tuple[dict[tuple[str, ...], Tensor], Counter[tuple[str, ...]]]:
        """Second moments and token counts of all processes; an expert may have had tokens in some of them only."""
        parts = processes.gather({layers: (len(gram_II), seen[layers]) for layers, gram_II in grams.items()})
        sizes = {layers: size for part in parts for layers, (size, _) in part.items()}
        dtype = at_least_float32(torch.empty(0, dtype=self.dtype)).dtype
        added = {
            layers: grams[layers] if layers in grams else torch.zeros(size, size, dtype=dtype, device=self.device)
            for layers, size in sizes.items()
        }
        for gram_II in added.values():
            processes.add_up([gram_II], "statistics")
        return added, Counter({layers: sum(part.get(layers, (0, 0))[1] for part in parts) for layers in sizes})

    @torch.no_grad()
    def _first_inputs(self, input_ids: Tensor) -> Tensor:
        """Hidden states before the first block. The forward is stopped there."""
        caught: list[Tensor] = []

        class Stop(Exception):
            pass

        def catch(module: nn.Module, args: Any, kwargs: Any) -> None:
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise Stop

        # Before the hook that reads the block from disk.
        handle = self.modules[0].register_forward_pre_hook(catch, prepend=True, with_kwargs=True)
        try:
            self.model.base_model(input_ids=input_ids, use_cache=False)
        except Stop:
            pass
        finally:
            handle.remove()
        return caught[0]

    @contextmanager
    def _recorded_inputs(self, i: int) -> Iterator[dict[str, Tensor]]:
        """Layer name within block i -> its inputs [N, I] in the forward that runs inside the context."""
        inputs: dict[str, Tensor] = {}

        def record(name: str) -> Callable[[nn.Module, Any], None]:
            return lambda module, args: inputs.update({name: args[0].flatten(0, -2)})

        handles = [
            self.modules[i].get_submodule(name).register_forward_pre_hook(record(name)) for name in self.layers[i]
        ]
        try:
            yield inputs
        finally:
            for handle in handles:
                handle.remove()


def get_linear(block: nn.Module, name: str) -> nn.Linear:
    """The linear layer with this name within a block."""
    return block.get_submodule(name)  # type: ignore[return-value]


def set_weight(block: nn.Module, name: str, weight_OI: Tensor) -> None:
    """Replace the weight of a linear layer by a frozen parameter that shares the memory of weight_OI."""
    get_linear(block, name).weight = nn.Parameter(weight_OI, requires_grad=False)


def _add_lower(gram_II: Tensor, x_NI: Tensor, factor: float) -> None:
    """gram += factor * x^T x, in place, for the blocks on and below the diagonal only: 5/8 of the work."""
    in_bfloat16 = x_NI.dtype == torch.bfloat16
    x_NI = at_least_float32(x_NI)
    with products_of_bfloat16(x_NI.device) if in_bfloat16 else nullcontext():
        for start, end in pairwise(len(gram_II) * quarter // 4 for quarter in range(5)):
            gram_II[start:end, :end].addmm_(x_NI[:, start:end].T, x_NI[:, :end], alpha=factor)


def _symmetric(gram_II: Tensor) -> Tensor:
    """The symmetric matrix of which the part on and below the diagonal is known, in its memory."""
    return gram_II.tril_().add_(gram_II.tril(-1).T)


def _group_by_tensor(inputs: dict[str, Tensor]) -> dict[tuple[str, ...], Tensor]:
    """Names of the layers that are called with the same tensor -> that tensor."""
    groups: dict[int, list[str]] = {}
    for name, x_NI in inputs.items():
        groups.setdefault(x_NI.data_ptr(), []).append(name)
    return {tuple(names): inputs[names[0]] for names in groups.values()}
