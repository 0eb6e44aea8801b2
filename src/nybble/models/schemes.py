"""Which quantization scheme each layer of a model gets, by the options of the scheme.

1. Linear layers have --bits, --group_size and --symmetric; embedding and head 8 bits per row. Where --bits is an
   average, linear layers have the bits below it, and those that are raised the bits above it.
2. --layer changes that for the layers that a pattern matches; the last pattern that matches wins. A tied head is the
   embedding, which both names match. An embedding or a head of less than 8 bits has the groups and the symmetry of
   the linear layers, as one scale for a whole row of so few codes is too coarse.
3. Layers that --ignore matches stay in 16 bits, and so do rows whose codes fill no whole bytes.
4. Rows that the group size does not divide get smaller groups (`fallback_group_size`; with --target npu the whole row).
   Rows of less than 16 weights without such groups stay in 16 bits: their scales would outweigh what they save.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from nybble.errors import OptionError
from nybble.models.selection import LayerSelection
from nybble.options.scheme import DEFAULT_GROUP_SIZE, NPU_GROUP_SIZE, WHOLE_ROW, LayerRule, SchemeOptions
from nybble.quant.scheme import CODES_PER_UNIT, INT8_PER_ROW, QuantScheme, check_scheme, fallback_group_size

_SMALLEST_ROW = 16
_EXAMPLES = 3


def linear_scheme(options: SchemeOptions, raised: bool = False) -> QuantScheme:
    """The scheme of the linear layers that no pattern matches, or of those that are raised."""
    bits = options.neighbouring_bits[raised]
    npu = options.target == "npu"
    group_size = options.group_size or (NPU_GROUP_SIZE if npu else DEFAULT_GROUP_SIZE)
    return QuantScheme(bits, _groups(group_size), options.symmetric or npu or bits == 8)


def assign_schemes(
    selection: LayerSelection, model: Any, options: SchemeOptions, raised: Collection[str] = ()
) -> LayerSelection:
    """Give each selected layer a scheme, and leave out those that stay in 16 bits.

    Args:
        selection: of `select_layers`.
        model: transformers.PreTrainedModel.
        options: of the scheme.
        raised: linear layers that get the bits above an average, unless --layer gives them others.

    Returns:
        The selection with `schemes` and with `notes` on layers that have another scheme than was asked for.

    Raises:
        OptionError: with strict_group_size, a group size that does not divide; or a scheme that --target does not
            allow.
    """
    names = _names(selection, model)
    schemes: dict[str, QuantScheme] = {}
    other_groups: dict[str, str] = {}
    too_narrow: list[str] = []
    for name in (*selection.linears, *selection.embeddings):
        if any(matches(pattern, names[name]) for pattern in options.ignore):
            continue
        wanted = _wanted(options, names[name], name in selection.embeddings, name in raised)
        width = int(model.get_submodule(name).weight.shape[1])
        if options.strict_group_size:
            check_scheme(name, width, wanted)
        scheme = _fitting(wanted, width, options.target == "npu")
        if scheme is None:
            too_narrow.append(name)
            continue
        if scheme != wanted:
            other_groups[name] = f"{width} weights: {scheme}"
        schemes[name] = scheme
    selected = replace(
        selection,
        linears=tuple(name for name in selection.linears if name in schemes),
        embeddings=tuple(name for name in selection.embeddings if name in schemes),
        schemes=schemes,
        notes=_notes(other_groups, too_narrow),
    )
    if options.target == "npu":
        _check_npu(selected)
    return selected


def check_patterns(selection: LayerSelection, model: Any, options: SchemeOptions) -> None:
    """Raise OptionError for a pattern of --layer or --ignore that matches no layer, and where all layers are ignored.

    Args:
        selection: of `select_layers`, with all layers.
        model: transformers.PreTrainedModel.
        options: of the scheme.
    """
    names = [name for all_names in _names(selection, model).values() for name in all_names]
    given = [("--layer", rule.pattern) for rule in options.layer_rules()]
    for option, pattern in (*given, *(("--ignore", pattern) for pattern in options.ignore)):
        if not matches(pattern, names):
            near = get_close_matches(pattern, names, 1, 0.0)[0]
            raise OptionError(
                f"{option} must match the name of a layer; {pattern} matches none of {len(names)}; names are such as "
                f"{near}"
            )
    if all(any(fnmatchcase(name, pattern) for pattern in options.ignore) for name in selection.linears):
        raise OptionError("--ignore must leave a linear layer to quantize; it matches all; give fewer patterns")


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether a pattern matches one of the names of a layer."""
    return any(fnmatchcase(name, pattern) for name in names)


def average_bits(schemes: Mapping[str, QuantScheme], shapes: Mapping[str, tuple[int, int]]) -> float:
    """Bits per quantized weight, with scales and zero points.

    Args:
        schemes: layer name -> scheme.
        shapes: layer name -> [O, I].
    """
    weights = {name: rows * columns for name, (rows, columns) in shapes.items() if name in schemes}
    bits = sum(count * schemes[name].bits_per_weight(shapes[name][1]) for name, count in weights.items())
    return bits / (sum(weights.values()) or 1)


def average_code_bits(model: Any, selection: LayerSelection) -> float:
    """Bits per weight of the quantized linear layers, of the codes alone."""
    counts = {name: model.get_submodule(name).weight.numel() for name in selection.linears}
    bits = sum(count * selection.schemes[name].bits for name, count in counts.items())
    return float(bits / sum(counts.values()))


def weight_shapes(model: Any, selection: LayerSelection) -> dict[str, tuple[int, int]]:
    """Layer name -> [O, I] of the quantized layers of a model."""
    return {name: tuple(model.get_submodule(name).weight.shape) for name in selection.schemes}


def num_scales(model: Any, selection: LayerSelection) -> int:
    """Number of scales in the quantized linear layers."""
    shapes = weight_shapes(model, selection)
    return sum(shapes[name][0] * selection.schemes[name].num_groups(shapes[name][1]) for name in selection.linears)


def describe(selection: LayerSelection) -> str:
    """Which layers have which scheme, such as "210 linear layers uint4 asymmetric group 64, lm_head uint8 ..."."""
    counts = Counter(selection.schemes[name] for name in selection.linears)
    parts = [f"{count} linear layers {scheme}" for scheme, count in counts.items()]
    parts += [f"{name}{' (tied)' * selection.tied} {selection.schemes[name]}" for name in selection.embeddings]
    return ", ".join(parts)


def _names(selection: LayerSelection, model: Any) -> dict[str, tuple[str, ...]]:
    """Layer -> the names by which a pattern matches it: a tied head is the embedding."""
    names: dict[str, tuple[str, ...]] = {name: (name,) for name in (*selection.linears, *selection.embeddings)}
    if selection.tied:
        head = model.get_output_embeddings()
        of_head = (name for name, module in model.named_modules() if module is head)
        names[selection.embeddings[0]] += tuple(of_head)
    return names


def _wanted(options: SchemeOptions, names: tuple[str, ...], is_embedding: bool, raised: bool) -> QuantScheme:
    """The scheme that the options give a layer."""
    rule = next((r for r in reversed(options.layer_rules()) if matches(r.pattern, names)), LayerRule(""))
    linear = linear_scheme(options, raised)
    base = INT8_PER_ROW if is_embedding and (rule.bits or 8) == 8 else linear
    bits = rule.bits or base.bits
    symmetric = base.symmetric if rule.symmetric is None else rule.symmetric
    group_size = base.group_size if rule.group_size is None else _groups(rule.group_size)
    if rule.symmetric is None and base.bits == 8 != bits:  # 8 bits were symmetric because they always are
        symmetric = options.symmetric or options.target == "npu"
    return QuantScheme(bits, group_size, symmetric or bits == 8)


def _groups(group_size: int) -> int | None:
    return None if group_size == WHOLE_ROW else group_size


def _fitting(wanted: QuantScheme, width: int, npu: bool) -> QuantScheme | None:
    """The scheme for rows of `width` weights; None: they stay in 16 bits."""
    if width % CODES_PER_UNIT[wanted.bits]:
        return None
    if wanted.group_size is None or width % wanted.group_size == 0:
        return wanted
    group_size = None if npu else fallback_group_size(width, wanted.group_size)
    if group_size is None and width < _SMALLEST_ROW:
        return None
    return replace(wanted, group_size=group_size)


def _notes(other_groups: Mapping[str, str], too_narrow: list[str]) -> tuple[str, ...]:
    notes = []
    if other_groups:
        kinds = dict.fromkeys(other_groups.values())
        notes.append(
            f"the group size does not divide the rows of {_some(list(other_groups))}; they have other groups (rows of "
            f"{'; '.join(kinds)}); --strict_group_size refuses this"
        )
    if too_narrow:
        notes.append(f"{_some(too_narrow)} cannot be quantized, as the rows are too narrow; they stay in 16 bits")
    return tuple(notes)


def _some(names: list[str]) -> str:
    layers = f"{len(names)} layer{'s' * (len(names) > 1)}"
    return f"{layers} ({', '.join(names[:_EXAMPLES])}{', ...' * (len(names) > _EXAMPLES)})"


def _check_npu(selection: LayerSelection) -> None:
    """Raise OptionError for a scheme that OpenVINO's NPU plugin does not compute."""
    for name, scheme in selection.schemes.items():
        if name in selection.embeddings:
            right, needed = scheme == INT8_PER_ROW, str(INT8_PER_ROW)
        else:
            right = scheme.symmetric and scheme.group_size in (NPU_GROUP_SIZE, None)
            needed = f"symmetric groups of {NPU_GROUP_SIZE} or whole rows"
        if not right:
            raise OptionError(
                f"--target npu needs {needed}; {name} has {scheme}; change --layer, or leave --target out"
            )
