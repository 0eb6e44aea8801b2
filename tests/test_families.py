"""Every family through the whole flow: insert, a few steps, interrupt and resume, absorb, export, read back, logits."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.export import openvino
from nybble.models import families as models_families
from nybble.models import quantized_model, selection
from nybble.models.families import FAMILIES as FACTS
from nybble.options.commands import DistillOptions
from nybble.training.trainer import Trainer
from nybble.workflows.distill import distill
from tests.tiny import FAMILIES, make_config, make_tokenizer, save_model

STEPS = 4


def options(model: Path, run: Path, **changes: object) -> DistillOptions:
    base = DistillOptions(
        pretrained=str(model), output_dir=str(run), data=("python-docs",), start="rtn", seq_len=32, samples=8, epochs=2, batch_size=4, microbatch=2,
        lr=5e-3, scale_lr=5e-3, norm_lr=2e-3, lora_rank=4, valid_samples=4, test_samples=4, tasks=(), export=(), save_every=1, tensorboard=False,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training stops as by Ctrl-C in the middle of step `steps` + 1."""
    original = Trainer.run

    def run(self: Trainer) -> Iterator[dict[str, float]]:
        for record in original(self):
            if record["step"] > steps:
                raise KeyboardInterrupt
            yield record

    monkeypatch.setattr(Trainer, "run", run)


# The quick tests take the family with the most special features; make test takes all.
QUICK = ("gemma2",)


def quick(families: Iterable[str]) -> list[object]:
    return [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in families]


@pytest.mark.usefixtures("needs_openvino")
@pytest.mark.parametrize("family", quick(FAMILIES))
def test_whole_flow(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model", family, begin=family.startswith("gemma"))
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            distill(options(model, tmp_path / "run"))
    assert not (tmp_path / "run" / "quantized").exists()
    distill(options(model, tmp_path / "run", resume=True, export=("openvino",)))
    distill(options(model, tmp_path / "undisturbed"))

    def read(name: str) -> bytes:
        return (tmp_path / name / "quantized" / quantized_model.WEIGHTS_FILE).read_bytes()

    assert read("run") == read("undisturbed"), "resumed training must end with the same bits"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["best_step"] > 0, "training must lower the validation KL"
    assert results["codes_changed"] > 0
    errors = results["decoder_errors"]  # before and after training
    assert errors.keys() == {"compressed", "tuned"}
    assert all(len(found) == 2 and all(0 < error < 1 for error in found) for found in errors.values())
    assert errors["tuned"] != errors["compressed"]
    layers = {"phi3": 8}.get(family, 14)
    tied = FAMILIES[family][1].get("tie_word_embeddings", make_config(family).tie_word_embeddings)
    export = results["exports"]["openvino"]
    assert (export["weights_u4"], export["weights_u8"]) == (layers, 1 if tied else 2)
    assert export["logit_difference"] <= openvino.LOGIT_TOLERANCE
    assert FACTS[make_config(family).model_type].exported is True
    masks = attention_masks(tmp_path / "run" / "openvino")
    assert masks <= {"f32"}
    assert masks or family != "llama"
    # the 4-bit model that was measured is the one on disk, and OpenVINO gives its perplexity
    torch_ppl, ov_ppl = (results["models"][row]["token_perplexity"] for row in ("tuned", "openvino"))
    assert ov_ppl == pytest.approx(
        torch_ppl, rel=0.02
    )  # default properties: 8-bit activations where the machine has them


def attention_masks(folder: Path) -> set[str]:
    """Types of the masks that OpenVINO's attention gets: boolean ones make it slow. Eager attention, of models with soft-capping, has none."""
    import openvino

    operations = openvino.Core().read_model(folder / "openvino_model.xml").get_ops()
    return {
        op.input(3).get_element_type().get_type_name()
        for op in operations
        if op.get_type_name() == "ScaledDotProductAttention"
    }


@pytest.mark.usefixtures("needs_openvino")
@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_whole_flow_in_bfloat16(family: str, tmp_path: Path) -> None:
    """What a GPU does by default: 16-bit weights and biases, exported from a float32 copy."""
    model = save_model(tmp_path / "model", family)
    distill(options(model, tmp_path / "run", dtype="bfloat16", cache="recompute", export=("openvino",)))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["exports"]["openvino"]["logit_difference"] <= openvino.LOGIT_TOLERANCE
    assert results["best_step"] > 0


@pytest.mark.usefixtures("needs_openvino")
@pytest.mark.parametrize("family", quick(["smollm", "mistral", "gemma2", "gemma3"]))
def test_exported_model_handles_padding_and_windows(family: str, tmp_path: Path) -> None:
    """Two sequences of different length, left-padded, longer than the sliding window: logits as torch gives for each alone."""
    from nybble.qat import insert
    from tests.tiny import make_model

    model = make_model(family)
    quantized = insert.quantize_rows(model, selection.select_layers(model).int8)
    tmp_path.joinpath("ov").mkdir()
    openvino.export(model, make_tokenizer(), quantized, tmp_path / "ov")
    runtime = openvino.open_model(tmp_path / "ov", model.config, strict=True)
    long, short = torch.randint(0, 256, (1, 20)), torch.randint(0, 256, (1, 13))
    ids = torch.cat([long, torch.cat([torch.full((1, 7), 257), short], dim=1)])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    logits = runtime(input_ids=ids, attention_mask=mask).logits
    with torch.no_grad():
        torch.testing.assert_close(logits[:1], model(long).logits, rtol=0, atol=1e-3)
        torch.testing.assert_close(logits[1:, 7:], model(short).logits, rtol=0, atol=1e-3)


@pytest.mark.usefixtures("needs_openvino")
def test_generation_goes_on_from_the_state(tmp_path: Path) -> None:
    """Greedy generation through OpenVINO's key-value state gives torch's tokens, and computes each token once."""
    from tests.tiny import make_model

    model = make_model("smollm")
    tmp_path.joinpath("ov").mkdir()
    openvino.export(model, make_tokenizer(), {}, tmp_path / "ov")
    runtime = openvino.open_model(tmp_path / "ov", model.config, strict=True)
    lengths, original = [], runtime.run

    def spy(input_ids: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        lengths.append(input_ids.shape[1])
        return original(input_ids, *args, **kwargs)

    runtime.run = spy
    prompt = torch.randint(0, 256, (1, 9))
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(runtime.generate(prompt, **arguments), model.generate(prompt, **arguments))
    assert lengths == [9, *[1] * 7]


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2", "gemma3_text", "vaultgemma"])
def test_the_norm_offset_is_that_of_the_models_own_norms(family: str) -> None:
    config = AutoConfig.for_model(
        family,
        vocab_size=260,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
    )
    norm = AutoModelForCausalLM.from_config(config).base_model.norm
    inputs = torch.randn(4, 64)
    with torch.no_grad():
        norm.weight.fill_(1.0)
        one = norm(inputs)
        norm.weight.fill_(2.0)
        ratio = float((norm(inputs) / one).mean())
    assert ratio == pytest.approx(
        (2 + models_families.family_of(config).norm_offset) / (1 + models_families.family_of(config).norm_offset),
        rel=1e-4,
    )
