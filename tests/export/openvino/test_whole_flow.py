"""Every family through the whole flow: fake quantization, training, interruption, resuming, absorbing, export."""

from pathlib import Path

import pytest

from nybble.export.openvino.exporter import OpenVINOExporter
from nybble.models import quantized_file
from nybble.run.results import read_results
from nybble.workflows.distill import distill
from tests.export.openvino.test_experts import PRODUCTS
from tests.export.openvino.test_hybrids import KINDS
from tests.helpers import mixtures
from tests.helpers.distill import distill_options, interrupt_after
from tests.helpers.tiny import FAMILIES, make_config, save_model

pytestmark = pytest.mark.usefixtures("needs_openvino")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_flow(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model", family, begin=family.startswith("gemma"))
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            distill(distill_options(model, tmp_path / "run"))
    assert not (tmp_path / "run" / "quantized").exists()
    distill(distill_options(model, tmp_path / "run", resume=True, export=("openvino",)))
    distill(distill_options(model, tmp_path / "undisturbed"))

    resumed, undisturbed = (
        (tmp_path / name / "quantized" / quantized_file.WEIGHTS_FILE).read_bytes() for name in ("run", "undisturbed")
    )
    assert resumed == undisturbed, "resumed training must end with the same bits"
    results = read_results(tmp_path / "run")
    assert results.trainings[0].best_step > 0, "training must lower the validation KL"
    assert results.changes is not None
    assert results.changes.codes_changed > 0
    errors = results.decoder_errors
    assert errors.keys() == {"compressed", "tuned"}
    assert all(len(layers) == 2 and all(0 < error < 1 for error in layers) for layers in errors.values())
    assert errors["tuned"] != errors["compressed"]

    tied = FAMILIES[family][1].get("tie_word_embeddings", make_config(family).tie_word_embeddings)
    export = results.exports["openvino"]
    # phi3 has four linear layers per block instead of seven.
    assert (export["linear_weights"], export["embedding_weights"]) == (8 if family == "phi3" else 14, 1 if tied else 2)
    assert export["logit_difference"] <= 1e-4
    in_torch, in_openvino = (results.models[row]["token_perplexity"] for row in ("tuned", "openvino"))
    # OpenVINO's own settings quantize activations to 8 bits, where the hardware has them.
    assert in_openvino == pytest.approx(in_torch, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_whole_flow_in_bfloat16(family: str, tmp_path: Path) -> None:
    """The default on a GPU: 16-bit weights and biases, exported from a float32 copy."""
    model = save_model(tmp_path / "model", family)
    distill(distill_options(model, tmp_path / "run", dtype="bfloat16", weight_cache="recompute", export=("openvino",)))
    results = read_results(tmp_path / "run")
    assert results.exports["openvino"]["logit_difference"] <= 1e-4
    assert results.trainings[0].best_step > 0


def test_the_tested_families_are_those_of_the_whole_flow() -> None:
    dense = {make_config(family).model_type for family in FAMILIES}
    mixed = {mixtures.model_type(family) for family in PRODUCTS}
    assert OpenVINOExporter.tested_families == dense | mixed | KINDS.keys()
