"""Which module of a decoder block produces the inputs of which layers, for AWQ: found by trial on the block itself.

AWQ divides output channels of a source by factors, and multiplies the columns of all that reads them. So for every
module with a weight (a norm, a linear layer) a float32 copy of the block (block_trial.py) runs with the channels of the
module's output multiplied by different factors. A layer whose every input is then multiplied by the factor of one
channel, for all tokens alike, reads these channels: q_proj reads the norm, o_proj reads v_proj through the attention,
down_proj reads up_proj through the product with the gate. o_proj does not read q_proj in this sense.

    1. `_candidates`: all channels of the source at once. Modules that are called with the very output of the source
       undo the factors, so that what comes after them does not change (a router chooses the same experts).
    2. `_fused`: the last channels only, for a source of which one part is read through a nonlinear function (fused
       query, key and value; fused gate and up).
    3. `_keeps_output`: the mapping is applied to the copy as AWQ applies it, and the output of the block must stay the
       same. So a nonlinear activation, a norm or a second reader between the two rules a mapping out.

Layers with the same name up to an index (experts) are alike: one of them is tried for all, so experts that no token of
the trial reaches are covered too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.compression.block_trial import OTHERWISE, SAME, BlockTrial
from nybble.compression.chain import Arguments, find_block_list, record_blocks
from nybble.errors import ModelError, describe_error
from nybble.models.layers_on_disk import loaded_block
from nybble.models.norms import norm_offset

# Of a trial, where a model has as many positions. In a block with random weights no ReLU is then off for all of them.
_TOKENS = 32
# Largest change of the block's output by a mapping, relative. The factors of the proof are powers of two, so only norms
# with an offset round at all.
_MAX_CHANGE = 1e-5
# A linear source is also tried with outputs so much larger, which shows a clamp between it and its readers.
_GAIN = 64.0
# Channels of a fused source that are tried together at least.
_FEWEST_CHANNELS = 8
# Parts that a fused source is divided into at most: 64 heads with query, key and value are 192.
_MOST_PARTS = 256


@dataclass(frozen=True, eq=False)
class AWQMapping:
    """A module, and all that reads its output. Names are relative to a decoder block.

    Attributes:
        source: a norm or a linear layer.
        layers: the linear layers with quantized weights that read the output, up to an elementwise product with
            something else and a weighted mean over tokens.
        followers: modules with a 16-bit weight [O, I] that read it too, such as the router of experts.
        channel_I: which channel of the source each input of the layers comes from, int64. Query heads that share a
            value head have the same channels.
        norm_offset: a norm multiplies by its weight plus this.
    """

    source: str
    layers: tuple[str, ...]
    followers: tuple[str, ...]
    channel_I: Tensor
    norm_offset: float = 0.0


def find_mappings(model: Any, names: Sequence[str]) -> dict[str, tuple[AWQMapping, ...]]:
    """Find the mappings of all decoder blocks; blocks of the same kind are tried once.

    Args:
        model: a transformers model. It runs once on a few tokens, to see how its blocks are called.
        names: paths of the layers whose weights are quantized.

    Returns:
        Path of each block -> its mappings, in the order in which the layers are called.

    Raises:
        ModelError: the blocks are no chain, or their code does not run with other weights.
    """
    by_kind: dict[_Kind, tuple[AWQMapping, ...]] = {}
    result = {}
    for block in _blocks(model, names):
        if block.kind not in by_kind:
            with _failing_blocks(model):
                by_kind[block.kind] = _Finder(block.trial(), block.layers).find()
        result[block.path] = by_kind[block.kind]
    return result


def has_mapping(model: Any, names: Sequence[str]) -> bool:
    """Whether any block has a mapping; faster than to find them all. See `find_mappings`."""
    tried: set[_Kind] = set()
    for block in _blocks(model, names):
        with _failing_blocks(model):
            if block.kind not in tried and any(_Finder(block.trial(), block.layers).proven()):
                return True
        tried.add(block.kind)
    return False


@contextmanager
def _failing_blocks(model: Any) -> Iterator[None]:
    """Turn an error of the model's own code into a ModelError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise ModelError(
            f"awq needs decoder blocks that run in float32 with other weights; those of {model.config.model_type} do "
            f"not ({describe_error(error)}); use a method without awq, for example se+gptq"
        ) from error


_Kind = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class _Block:
    """One decoder block and how it is called.

    Attributes:
        path: in the model.
        module: the block.
        layers: names within the block of the layers whose weights are quantized.
        arguments: besides the hidden states.
        hidden_BTD: hidden states before the block.
    """

    path: str
    module: nn.Module
    layers: tuple[str, ...]
    arguments: Arguments
    hidden_BTD: Tensor

    @property
    def kind(self) -> _Kind:
        """Blocks of one kind have the same modules and the same layers to quantize."""
        return repr(self.module), self.layers

    def trial(self) -> BlockTrial:
        """A copy with random weights."""
        with loaded_block(self.module):
            return BlockTrial(self.module, self.arguments, self.hidden_BTD)


def _blocks(model: Any, names: Sequence[str]) -> Iterator[_Block]:
    path, embedding = find_block_list(model, names), model.get_input_embeddings()
    modules = list(model.get_submodule(path))
    tokens = min(_TOKENS, getattr(model.config, "max_position_embeddings", None) or _TOKENS)
    input_ids = torch.arange(tokens, device=model.device)[None] % embedding.num_embeddings
    record = record_blocks(model, modules, input_ids)
    for i, module in enumerate(modules):
        prefix = f"{path}.{i}."
        layers = tuple(name.removeprefix(prefix) for name in names if name.startswith(prefix))
        yield _Block(prefix[:-1], module, layers, record.arguments[i], record.hidden[i])


class _Finder:
    """Finds the mappings of one block.

    Args:
        trial: the copy of the block.
        layers: its layers whose weights are quantized.
    """

    def __init__(self, trial: BlockTrial, layers: Sequence[str]) -> None:
        self.trial, self.layers = trial, frozenset(layers)
        self.before = trial.run()
        self.order = list(self.before.inputs)
        self.patterns = {name: trial.pattern(name) for name in trial.modules}
        self.readers = [
            name for name in self.order if tuple(trial.weights[name].shape[1:]) == self.before.inputs[name].shape[1:]
        ]

    def find(self) -> tuple[AWQMapping, ...]:
        """All mappings, in the order in which their layers are called."""
        places = {name: place for place, name in enumerate((*self.order, *sorted(self.layers - set(self.order))))}
        found = [mapping for alike in self.proven() for mapping in alike]
        return tuple(sorted(found, key=lambda mapping: min(places[name] for name in mapping.layers)))

    def proven(self) -> Iterator[list[AWQMapping]]:
        """All mappings; those of experts together. Of several sources, a layer gets the one that is called last."""
        claimed: set[str] = set()
        for source in reversed(self._one_of_each_kind()):
            for candidate in self._candidates(source):
                alike = self._for_all_alike(candidate)
                layers = {name for mapping in alike for name in mapping.layers}
                if layers and claimed.isdisjoint(layers) and self._keeps_output(alike):
                    claimed |= layers
                    yield alike

    def _one_of_each_kind(self) -> list[str]:
        """Of the modules with the same name up to indices, the one with the most inputs; in the order of the calls."""
        chosen: dict[str, str] = {}
        for name in self.order:
            rival = chosen.setdefault(self.patterns[name], name)
            if len(self.before.inputs[name]) > len(self.before.inputs[rival]):
                chosen[self.patterns[name]] = name
        return [name for name in self.order if name in chosen.values()]

    def _candidates(self, source: str) -> Iterator[AWQMapping]:
        """What reads the channels of a source; readers of the same channels together."""
        weight, module = self.trial.weights[source], self.trial.modules[source]
        offset = norm_offset(module) if weight.ndim == 1 else 0.0
        if self.before.width(source) != len(weight):
            return
        read = self._try(source, 0, len(weight))
        channels = {name: channel_I for name, channel_I in read.items() if bool((channel_I >= 0).all())}
        if not channels and weight.ndim == 2:
            channels = self._fused(source, read)
        while channels:
            channel_I = next(iter(channels.values()))
            names = tuple(name for name, other_I in channels.items() if torch.equal(channel_I, other_I))
            layers = tuple(name for name in names if name in self.layers)
            followers = tuple(name for name in names if name not in self.layers)
            yield AWQMapping(source, layers, followers, channel_I, offset)
            channels = {name: other_I for name, other_I in channels.items() if name not in names}

    def _fused(self, source: str, read: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Reader -> channels, for the first reader with fewer inputs than the source has channels.

        The last channels are tried first, and nothing else if none of them is read linearly.

        Args:
            source: a linear layer.
            read: result of `_try` for all channels.
        """
        count = len(self.trial.weights[source])
        reader = next((name for name, channel_I in read.items() if bool((channel_I != SAME).any())), None)
        if reader is None or len(read[reader]) >= count:
            return {}
        found_I = torch.full_like(read[reader], SAME)
        size = math.gcd(count, len(found_I))
        # Parts still to be tried, the last one on top; a part that does not come out clean is divided.
        parts = [(start, start + size) for start in range(0, count, size)]
        smallest = max(_FEWEST_CHANNELS, count // _MOST_PARTS)
        while parts and bool((found_I == SAME).any()):
            start, end = parts.pop()
            if end <= count - size and bool((found_I == SAME).all()):
                return {}
            channel_I = self._try(source, start, end)[reader]
            if not bool((channel_I == OTHERWISE).any()):
                found_I = torch.where(channel_I >= 0, channel_I, found_I)
                if bool((channel_I >= 0).any()):  # the rest of the source is probably made of parts of this size
                    smallest = max(smallest, (end - start) // 4)
            elif (part := (end - start) // _largest_prime_factor(end - start)) >= smallest:
                parts += [(first, first + part) for first in range(start, end, part)]
        return {reader: found_I} if bool((found_I >= 0).all()) else {}

    def _try(self, source: str, start: int, end: int) -> dict[str, Tensor]:
        """Reader -> for each of its inputs the channel from `start` to `end` of the source, SAME or OTHERWISE."""
        direct = frozenset(name for name in self.readers if self.before.reads_output(name, source))
        read = self.trial.channels_read(source, start, end, direct, self.before)
        return {name: read[name] for name in self.readers if name in read and name != source}

    def _for_all_alike(self, mapping: AWQMapping) -> list[AWQMapping]:
        """The mapping of all sources that differ in their indices only, with layers that no token has reached."""
        by_pattern: dict[str, list[str]] = {}
        for name, pattern in self.patterns.items():
            by_pattern.setdefault(pattern, []).append(name)
        mappings = []
        for source in by_pattern[self.patterns[mapping.source]]:
            layers, followers = (
                tuple(
                    name
                    for pattern in dict.fromkeys(self.patterns[name] for name in names)
                    for name in by_pattern[pattern]
                    if self._indices(name)[: len(self._indices(source))] == self._indices(source)
                )
                for names in (mapping.layers, mapping.followers)
            )
            mappings.append(AWQMapping(source, layers, followers, mapping.channel_I, mapping.norm_offset))
        return mappings

    def _indices(self, name: str) -> list[str]:
        """The indices of a module in lists: ["3"] in mlp.experts.3.up_proj."""
        parts = zip(name.split("."), self.patterns[name].split("."), strict=True)
        return [part for part, pattern in parts if pattern == "*"]

    def _keeps_output(self, mappings: Sequence[AWQMapping]) -> bool:
        """Whether the block computes the same with these mappings applied."""
        gains = (1.0, _GAIN) if self.trial.weights[mappings[0].source].ndim == 2 else (1.0,)
        for gain in gains:
            plain: dict[str, Tensor] = {}
            folded: dict[str, Tensor] = {}
            for mapping in mappings:
                original, changed = self._parameters(mapping, gain)
                plain, folded = plain | original, folded | changed
            before, after = self.trial.run(plain).outputs, self.trial.run(folded).outputs
            if len(before) != len(after) or not all(map(_alike, before, after)):
                return False
        return True

    def _parameters(self, mapping: AWQMapping, gain: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The parameters of a mapping with a larger source, and the same after folding: names and tensors."""
        source, offset = mapping.source, mapping.norm_offset
        weight = self.trial.weights[source] * gain
        plain = {f"{source}.weight": weight}
        exponents_R = self.trial.permutation(len(weight)) % 5 - 2
        used_R = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
        used_R[mapping.channel_I] = True
        s_R = torch.where(used_R, 2.0**exponents_R, 1.0)
        folded = {f"{source}.weight": (weight.T / s_R).T if weight.ndim == 2 else (weight + offset) / s_R - offset}
        if source in self.trial.biases:
            bias_R = self.trial.biases[source] * gain
            plain[f"{source}.bias"], folded[f"{source}.bias"] = bias_R, bias_R / s_R
        for name in (*mapping.layers, *mapping.followers):
            folded[f"{name}.weight"] = self.trial.weights[name] * s_R[mapping.channel_I]
        return plain, folded


def _alike(before: Tensor, after: Tensor) -> bool:
    """Whether two tensors are equal but for rounding; masks hold infinities."""
    if before.shape != after.shape:
        return False
    finite = before.isfinite()
    difference = torch.where(finite, after - before, 0.0).norm()
    return bool(difference <= _MAX_CHANGE * torch.where(finite, before, 0.0).norm())


def _largest_prime_factor(number: int) -> int:
    """The largest prime factor of a number above 1."""
    factor = 2
    while factor * factor <= number:
        if number % factor == 0:
            number //= factor
        else:
            factor += 1
    return number
