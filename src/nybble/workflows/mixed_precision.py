"""--bits 4.5: give each linear layer the bits below or above an average, before a run begins.

The choice is made on the model as it was loaded and on the first calibration sequences, and is kept in results.json: a
run that is resumed has the same bits. Methods come afterwards; what a layer gains from more bits is measured with plain
rounding for all of them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence

from nybble.data.prepare import TextData
from nybble.errors import OptionError
from nybble.export.checks import check_named
from nybble.models.loading import LoadedModel
from nybble.models.schemes import assign_schemes, average_code_bits, weight_shapes
from nybble.models.selection import LayerSelection, select_layers
from nybble.options.commands import RunCommand
from nybble.options.compression import MIN_CALIBRATION_SAMPLES
from nybble.options.scheme import SchemeOptions
from nybble.run.marker import is_run
from nybble.run.results import read_results
from nybble.training.mixed_precision import choice_groups, choose_layers, layer_gains

log = logging.getLogger("nybble")

# Tokens that gains are measured on, in whole sequences. On SmolLM2 two different texts of this length agree in 92 % of
# the weights that get the higher width.
_TOKENS = 4096


def num_sequences(options: SchemeOptions, seq_len: int) -> int:
    """Calibration sequences that the choice of bits needs; 0 where --bits is no average."""
    return max(MIN_CALIBRATION_SAMPLES, _num_measured(seq_len)) if options.is_average else 0


def _num_measured(seq_len: int) -> int:
    """Sequences that gains are measured on."""
    return -(-_TOKENS // seq_len)


def _both_selections(loaded: LoadedModel, options: SchemeOptions) -> tuple[LayerSelection, LayerSelection]:
    """All layers with the bits below an average, and with those above."""
    model, everything = loaded.model, select_layers(loaded.model)
    low, high = (assign_schemes(everything, model, options, names) for names in ((), everything.linears))
    return low, high


def choose_bits(options: RunCommand, formats: Sequence[str], loaded: LoadedModel, text: TextData) -> LayerSelection:
    """Give each linear layer its bits: the average over all weights is at most --bits. Says how many get which.

    Args:
        options: of the run, whose --bits is an average.
        formats: of --export.
        loaded: the 16-bit model.
        text: its calibration sequences are used.

    Raises:
        OptionError: there is no calibration text yet, --layer leaves no choice, its bits are above the average, or a
            format cannot hold one of the two widths.
        ExportError: a format cannot hold the model.
        ModelError: the model has no gradients.
    """
    for selection in _both_selections(loaded, options.scheme):
        columns = {name: shape[1] for name, shape in weight_shapes(loaded.model, selection).items()}
        check_named(formats, loaded.model.config, selection, columns)
    raised = _chosen_before(options)
    if raised is None:
        raised = _choose(options.scheme, loaded, text)
    selection = assign_schemes(select_layers(loaded.model), loaded.model, options.scheme, raised)
    log.info("%s: %.2f bits a weight", _counts(selection), average_code_bits(loaded.model, selection))
    for note in selection.notes:
        log.warning(note)
    return selection


def _choose(options: SchemeOptions, loaded: LoadedModel, text: TextData) -> Collection[str]:
    model, (low, high) = loaded.model, _both_selections(loaded, options)
    free = [name for name in low.linears if name in high.schemes and low.schemes[name].bits != high.schemes[name].bits]
    if not free:
        raise OptionError(
            f"--bits {options.bits:g} must leave layers to choose bits for; --layer gives all of them a number; give "
            "--bits 2, 3, 4 or 8"
        )
    average = average_code_bits(model, low)
    if average > options.bits:
        raise OptionError(
            f"--bits {options.bits:g} must be at least what --layer gives alone; with {options.neighbouring_bits[0]} "
            f"bits in all other layers the average is {average:.2f}; give a larger --bits, or --layer fewer bits"
        )
    if text.pending is not None:
        raise OptionError(
            f"--bits {options.bits:g} chooses layers on calibration text before the run begins; the text of --data "
            "self is generated later; name other --data, or the self.safetensors of an earlier run"
        )
    ids_ST = text.calibration[: _num_measured(text.calibration.shape[1])]
    log.info(
        "which layers get %d bits: gradient of the KL divergence on %d x %d tokens",
        options.neighbouring_bits[1], *ids_ST.shape,
    )  # fmt: skip
    counts = {name: model.get_submodule(name).weight.numel() for name in low.linears}
    costs = {name: counts[name] * (high.schemes[name].bits - low.schemes[name].bits) for name in free}
    gains = layer_gains(
        model, {name: low.schemes[name] for name in low.linears}, {name: high.schemes[name] for name in free}, ids_ST
    )
    budget = (options.bits - average) * sum(counts.values())
    return choose_layers(gains, costs, choice_groups(model, free), budget)


def _chosen_before(options: RunCommand) -> Collection[str] | None:
    """The layers that an earlier session of a run gave the bits above the average; None if there is none."""
    if not (options.run.resume and is_run(options.folder)):
        return None
    layers = read_results(options.folder).layers
    if layers is None or not layers.bits:
        return None
    return [name for name, bits in layers.bits.items() if bits == options.scheme.neighbouring_bits[1]]


def _counts(selection: LayerSelection) -> str:
    """How many linear layers have how many bits, such as "12 of 210 linear layers get 8 bits, 198 get 4"."""
    counts = Counter(selection.schemes[name].bits for name in selection.linears)
    (bits, count), *others = sorted(counts.items(), reverse=True)
    rest = "".join(f", {number} get {width}" for width, number in others)
    return f"{count} of {len(selection.linears)} linear layers get {bits} bits{rest}"
