"""Write the generated pages of the reference, docs/reference/cli.md, python.md and models.md, and the table of families
and formats in README.md.

    python docs/make_reference.py

cli.md lists every option of every command, from the option classes in src/nybble/options. python.md names the public
objects of the package, which mkdocstrings describes from their docstrings when the site is built. models.md has the
families that the tests of the exporters cover, and every causal type with what tests/golden/model_types.json says of
it. The pages are committed; a test compares them with what this script writes.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nybble
from nybble import api
from nybble.cli.help import USAGE
from nybble.export import EXPORTERS
from nybble.options.base import NONE, Command, describe_type
from nybble.options.commands import COMMANDS

_PLACEHOLDERS = {
    "a number": "X",
    "a whole number": "N",
    "text": "TEXT",
    "a list of texts": "NAME ...",
    "a list of whole numbers": "N ...",
}
FOLDER = Path(__file__).parent / "reference"
GENERATED = "<!-- Written by docs/make_reference.py; do not edit. -->\n\n"


def command_line_page() -> str:
    """The page of all commands and options."""
    parts = [
        GENERATED + "# Command line\n",
        f"```text\n{USAGE.rstrip()}\n```\n",
        "`nybble COMMAND --help` shows the basic options of a command, which stand in **bold** below; `--help-all` "
        "shows all. Lists are written with spaces (`--data a.txt b.txt`), an empty list is written `none`. The same "
        "names are keys of a TOML file (`--config FILE.toml`) and keywords of the Python functions. Values are taken "
        "from, in rising order of precedence: defaults, the run's `config.toml` on `--resume`, `--config`, flags.\n",
        "Exit codes: 0 done; 2 an error that you can repair, printed as one line; 70 a fault of nybble; 130, 143 and "
        "129 ended by Ctrl-C, SIGTERM and SIGHUP; 141 the reader of its output has ended.\n",
    ]
    for kind in COMMANDS.values():
        parts.append(_command(kind))
    parts.append("## nybble env { #env }\n\nShow versions and hardware. This command takes no options.\n")
    return "\n".join(parts)


def _command(kind: type[Command]) -> str:
    positional, types = kind.positional(), kind.types()
    usage = f"nybble {kind.NAME}" + (f" {positional.upper()}" if positional else "") + " [options]"
    parts = [f"## nybble {kind.NAME} {{ #{kind.NAME} }}\n", f"{(kind.__doc__ or '').splitlines()[0]}\n",
             f"```text\n{usage}\n```\n"]  # fmt: skip
    titles: dict[str, list[dataclasses.Field[Any]]] = {}
    for group in kind.groups().values():
        titles.setdefault(group.TITLE, []).extend(dataclasses.fields(group))  # type: ignore[arg-type]
    for title, fields in titles.items():
        ordered = sorted(fields, key=lambda field: not field.metadata["required"])
        rows = "\n".join(_row(field, types[field.name], field.name == positional) for field in ordered)
        parts.append(
            f"### {title} {{ #{kind.NAME}-{title.lower().replace(' ', '-')} }}\n\n"
            f'<div class="options" markdown>\n\n| option | default | meaning |\n| --- | --- | --- |\n{rows}\n\n</div>\n'
        )
    return "\n".join(parts)


def _row(field: dataclasses.Field[Any], hint: Any, positional: bool) -> str:
    text = field.metadata["help"]
    if positional:
        name = field.name.upper()
    elif hint is bool:
        name = f"--{'no_' if field.default else ''}{field.name}"
    elif typing.get_origin(hint) is typing.Literal:
        name = f"--{field.name} NAME"
        text += " One of " + ", ".join(f"`{value}`" for value in typing.get_args(hint)) + "."
    else:
        name = f"--{field.name} {_PLACEHOLDERS[describe_type(hint)]}"
    shown = f"**`{name}`**" if field.metadata["basic"] else f"`{name}`"
    negated = hint is bool and field.default
    default = "required" if field.metadata["required"] else _default(not negated and field.default)
    default = "" if "Default:" in text else default
    return f"| {shown} | {default} | {text.replace('|', chr(92) + '|').replace('<', '&lt;')} |"


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value in (None, ""):
        return ""
    if isinstance(value, tuple):
        return f"`{' '.join(map(str, value)) or NONE}`"
    return f"`{value}`"


def python_page() -> str:
    """The page of the public names, in the order of `nybble.__all__`, functions of commands first."""
    commands = [name for name in COMMANDS if name in nybble.__all__]
    rest = [name for name in nybble.__all__ if name not in commands]
    parts = [
        GENERATED + "# Python\n",
        "These names are public; everything else may change. The functions of the commands take the options of the "
        '[command line](cli.md) as keywords: `nybble.distill(pretrained="smollm2", data="python-docs")`. A wrong '
        "option, model or text raises a subclass of `NybbleError`, whose message says what was required, what came, "
        "and what to do.\n",
    ]
    for name in (*commands, *rest):
        value = getattr(api if name in commands else nybble, name)
        parts.append(f"::: {value.__module__}.{value.__qualname__}\n")
    return "\n".join(parts)


# Model type -> the name that people know, and what its tests cover.
_FAMILIES = {
    "llama": ("Llama 3.x, SmolLM2", "grouped heads, llama3 rope, tied heads; the real SmolLM2"),
    "mistral": ("Mistral", "sliding window"),
    "qwen2": ("Qwen2, Qwen2.5", "biases, sliding window"),
    "qwen3": ("Qwen3", "q/k norms, separate head size"),
    "gemma2": ("Gemma 2", "norm offset, soft-capped logits"),
    "gemma3_text": ("Gemma 3 (text)", "q/k norms, two ropes; the real Gemma 3 270M"),
    "phi3": ("Phi-3, Phi-3.5", "fused projections, longrope"),
}
# The same for mixtures of experts.
_MIXTURES = {
    "mixtral": ("Mixtral", "two of the experts for a token"),
    "qwen2_moe": ("Qwen2 MoE", "shared expert with a gate"),
    "qwen3_moe": ("Qwen3 MoE", "layers with and without experts"),
    "gpt_oss": ("gpt-oss", "transposed experts with biases, interleaved gates, attention sinks"),
    "glm4_moe": ("GLM-4.5", "dense first layer, groups of experts, shared expert"),
    "granitemoe": ("Granite MoE", "scaled residuals and logits"),
    "olmoe": ("OLMoE", "q/k norms"),
    "ernie4_5_moe": ("ERNIE 4.5", "dense first layer, shared expert"),
    "phimoe": ("Phi-3.5 MoE", "sparse mixer"),
    "llama4_text": ("Llama 4 (text)", "one expert for a token, scaled inputs, chunked attention"),
    "deepseek_v2": ("DeepSeek V2", "latent attention, groups of experts, shared experts"),
    "deepseek_v3": ("DeepSeek V3, R1, Kimi K2", "latent attention, sigmoid router, shared experts"),
    "qwen3_next": ("Qwen3-Next", "linear attention, shared expert with a gate"),
    "qwen3_5_moe_text": ("Qwen3.5 MoE (text)", "linear attention, shared expert with a gate"),
    "kimi_linear": ("Kimi Linear", "gated delta rule with a decay for each channel, latent attention"),
    "lfm2_moe": ("LFM2 MoE", "short convolutions"),
    "nemotron_h": ("Nemotron-H", "state space layers, experts without gates"),
    "jetmoe": ("JetMoe", "experts in attention"),
    "longcat_flash": ("LongCat-Flash", "latent attention, experts that return their inputs"),
}
# The same for other families: positions by ALiBi, latent attention, linear attention, convolutions, state spaces.
_OTHERS = {
    "falcon": ("Falcon", "ALiBi, parallel attention"),
    "bloom": ("BLOOM", "ALiBi"),
    "mpt": ("MPT", "ALiBi"),
    "gpt_bigcode": ("StarCoder", "one key and value head"),
    "youtu": ("Youtu", "latent attention"),
    "lfm2": ("LFM2", "short convolutions"),
    "qwen3_5_text": ("Qwen3.5 (text)", "gated delta rule"),
    "olmo_hybrid": ("OLMo Hybrid", "gated delta rule"),
    "mamba": ("Mamba", "state space layers only"),
    "mamba2": ("Mamba 2", "state space layers only"),
    "falcon_mamba": ("Falcon Mamba", "state space layers only"),
    "falcon_h1": ("Falcon-H1", "attention and state space in one layer"),
    "bamba": ("Bamba", "attention and state space layers"),
    "granitemoehybrid": ("Granite 4 (dense)", "attention and state space layers"),
    "jamba": ("Jamba (dense)", "attention and state space layers"),
}
TYPES = Path(__file__).parents[1] / "tests" / "golden" / "model_types.json"
# A part of what the golden file says -> the reason in words, in the order of their numbers. Others stand as they are.
_REASONS = {
    "must be a language model alone": "Text does not reach all of its layers: some read an encoder or images.",
    "must be of a model type that": "transformers has no `AutoModelForCausalLM` for its checkpoints.",
    "must have weights of its own in every layer": "Layers share a weight.",
    "must predict a token from the tokens before it": "It is not causal.",
    "must have experts of a kind that": "Its experts are stored in a way that nybble does not know.",
    "must have most weights in nn.Linear": "Most of its weights are outside of `nn.Linear`.",
    "must leave its weights as they are": "It changes its weights when it first computes.",
    "must be a model that can be trained": "Its code has no backward for some layers.",
    "OpenVINO traces the model with its past": "Its code cannot be traced with past states.",
    "OpenVINO needs layers that keep keys": "It has past states other than keys, values, convolutions and recurrences.",
    "the traced graph must use": "The trace leaves out some layers.",
    "GGUF needs a model type of": "nybble has no names of this type's tensors in llama.cpp.",
    "GGUF needs a model whose parts": "The tiny model has an option that llama.cpp does not compute for this type, "
    "such as a sliding window; the tables above show what real models have.",
    "ONNX needs one of the model types": "nybble has no ONNX graph for this type.",
    "vLLM needs models that are published": "Published tensors hold several matrices, where vLLM needs one for each "
    "layer and expert.",
    "vLLM needs rows in multiples": "The tiny model has a layer whose rows vLLM cannot split with zero points; "
    "`--symmetric` has none.",
    "vLLM needs nn.Linear layers": "It has Conv1D layers.",
    "an export to vLLM needs groups": "The tiny model has a layer of a width that 32 does not divide.",
    "needs a model that transformers saves": "transformers saves it under other names than it loads.",
    "MLX needs a model type that": "mlx-lm has no code for this type.",
    "MLX needs experts of": "nybble has no names of this type's experts in mlx-lm.",
    "MLX needs attention to at least": "The tiny model has a sliding window shorter than mlx-lm computes.",
    "MLX needs full attention in every": "The tiny model has full attention in other layers than mlx-lm.",
    "the runtime of": "The runtime's own code for this type fails on the tiny model.",
    "must give the logits of torch": "The logits of the export differ from those of torch.",
}
README = Path(__file__).parents[1] / "README.md"
_BEGIN, _END = "<!-- support: written by docs/make_reference.py -->", "<!-- end of support -->"


def support_table(families: dict[str, tuple[str, str]] = _FAMILIES) -> str:
    """Families and formats, from what the exporters' tests cover."""
    formats = [EXPORTERS[name] for name in EXPORTERS]
    unnamed = {kind for exporter in formats for kind in exporter.tested_families} - (
        _FAMILIES | _MIXTURES | _OTHERS
    ).keys()
    assert not unnamed, f"{unnamed} need a name in one of these tables"
    lines = [
        "|family|tested with|" + "|".join(exporter.name for exporter in formats) + "|",
        "|---|---|" + ":---:|" * len(formats),
    ]
    for kind, (name, covered) in families.items():
        marks = ("✓" if kind in exporter.tested_families else "–" for exporter in formats)
        lines.append(f"|{name}|{covered}|{'|'.join(marks)}|")
    return "\n".join(lines)


def every_type(outcomes: Mapping[str, Mapping[str, str]]) -> str:
    """A table of every causal type: a check mark where a command or an export works, else the number of the reason.

    Args:
        outcomes: type -> command or export -> "works", or what the error requires.
    """
    columns = ["compress rtn", "compress auto", "distill", "tune", *(f"export {name}" for name in EXPORTERS)]
    found = dict.fromkeys(text for row in outcomes.values() for text in row.values() if text != "works")
    words = {text: next((_REASONS[part] for part in _REASONS if part in text), f"{text}.") for text in found}
    order = [*_REASONS.values(), *words.values()]
    reasons = sorted(set(words.values()), key=order.index)
    cells = {text: str(reasons.index(words[text]) + 1) for text in found} | {"works": "✓", "": ""}
    rows = [f"|{kind}|{'|'.join(cells[row.get(c, '')] for c in columns)}|" for kind, row in outcomes.items()]
    works = [f"**{sum(row.get(column) == 'works' for row in outcomes.values())}**" for column in columns]
    heads = [column.split()[-1] for column in columns]
    return "\n".join(
        [
            '<div class="types" markdown>\n',
            f"|type|{'|'.join(heads)}|",
            f"|---|{':---:|' * len(columns)}",
            f"|**{len(outcomes)} types**|{'|'.join(works)}|",
            *rows,
            "\n</div>\n",
            *(f"{i + 1}. {reason}" for i, reason in enumerate(reasons)),
        ]
    )


def models_page() -> str:
    """The page of all families and formats."""
    return f"""{GENERATED}# Models

Tests take each of these families through every export that is marked, and compare the export with torch: weights to the
bit, logits of a prompt and of decoding. Where a dash stands, these tests do not try it; the table of types at the end
says whether it works.

## Dense

{support_table(_FAMILIES)}

## Mixtures of experts

Experts get 4 bits. What chooses among them or weighs them stays in 16 bits. Each expert is compressed with the
calibration tokens that the router sends to it; one that gets fewer than 16 is rounded to nearest, and the log says so.

{support_table(_MIXTURES)}

In OpenVINO only the experts that a token needs are computed, except for Llama 4, Nemotron-H, LongCat-Flash and JetMoe.

## Hybrids and others

The time steps of state space scans (`dt_proj` of Mamba, Falcon Mamba and Jamba) stay in 16 bits.

{support_table(_OTHERS)}

## With vision or audio

The language model inside is quantized; towers and projectors stay in 16 bits and are saved with it. hf and vllm hold
the whole model, other formats the text model alone. Tests cover Gemma 3 from compression to an image in the export;
Gemma 4, Mistral 3, Idefics 3, SmolVLM, Llama 4, Qwen2.5-VL, Qwen3.5 and Llama 3.2 Vision are compressed and exported to
hf.

## Others

Other Llama-like models usually work: their logits are checked before training, and a small twin of the model goes
through the whole run first. What cannot work is refused there, with the reason.

## Every causal type of transformers

Tests make a tiny random model of each type and take it through every command and every export. A check mark means that
it works, and that what was exported was compared with torch. A number is the reason why it is refused, before the work;
the reasons stand below the table. Exports are not tried where compression is refused. rtn and auto are methods of
`nybble compress`.

{every_type(json.loads(TYPES.read_text(encoding="utf-8")))}
"""


def readme_with_table() -> str:
    """README.md with the table as it is now."""
    before, _, rest = README.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n\n{support_table()}\n\n{_END}{after}"


PAGES = {"cli.md": command_line_page, "python.md": python_page, "models.md": models_page}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, page in PAGES.items():
        (FOLDER / file).write_text(page(), encoding="utf-8")
        print(FOLDER / file)
    README.write_text(readme_with_table(), encoding="utf-8")
