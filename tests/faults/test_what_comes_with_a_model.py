"""Generation settings, chat template, tokenizer and licence travel unchanged to quantized/ and to exports."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from nybble.cli.main import main
from nybble.models.companions import companion_files
from nybble.models.quantized_model import load_quantized
from tests.helpers.compress import compress_command
from tests.helpers.tiny import make_tokenizer, save_model

# Several ends of sequence, and settings that transformers calls contradictory and refuses to save.
GENERATION = {"eos_token_id": [257, 258], "do_sample": False, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 7}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def model_with_companions(folder: Path) -> Path:
    save_model(folder, "llama")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>", "<more>"]})
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md"):
        (folder / name).write_text(f"the {name} of this model\n")
    (folder / "added_tokens.json").write_text('{"<extra>": 258}')
    return folder


def check_same(files: tuple[Path, ...], folder: Path) -> None:
    assert len(files) >= 5
    for file in files:
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


def test_they_are_in_the_quantized_folder_and_in_the_export(tmp_path: Path) -> None:
    model, run = model_with_companions(tmp_path / "model"), tmp_path / "run"
    assert main(compress_command(model, run, "--export", "hf")) == 0
    files = companion_files(model, AutoTokenizer.from_pretrained(model))
    check_same(files, run / "quantized")
    check_same(files, run / "hf")


def test_the_settings_are_used_when_the_quantized_model_generates(tmp_path: Path) -> None:
    model, run = model_with_companions(tmp_path / "model"), tmp_path / "run"
    assert main(compress_command(model, run)) == 0
    generation = load_quantized(run / "quantized", None).model.generation_config  # type: ignore[arg-type]
    assert (generation.eos_token_id, generation.temperature, generation.max_new_tokens) == ([257, 258], 0.6, 7)


@pytest.mark.slow  # two exports
@pytest.mark.usefixtures("needs_openvino")
def test_openvino_genai_stops_at_each_end_of_sequence(tmp_path: Path) -> None:
    genai = pytest.importorskip("openvino_genai", reason="the extra openvino")
    model, run = model_with_companions(tmp_path / "model"), tmp_path / "run"
    assert main(compress_command(model, run, "--export", "openvino")) == 0
    settings = genai.LLMPipeline(str(run / "openvino"), "CPU").get_generation_config()
    assert (settings.stop_token_ids, settings.max_new_tokens) == ({257, 258}, 7)
    assert settings.temperature == pytest.approx(0.6)
    before = {file.name: file.read_bytes() for file in (run / "openvino").iterdir()}
    assert main(["export", str(run), "--to", "openvino"]) == 0
    check_same(companion_files(run / "quantized", make_tokenizer()), run / "openvino")
    assert {file.name for file in (run / "openvino").iterdir()} == before.keys()


@pytest.mark.slow  # a process that imports torch
def test_of_a_hub_model_they_come_from_the_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / "abc"
    model_with_companions(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    run = tmp_path / "run"
    command = compress_command(Path("someone/tiny"), run)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "nybble", *command], check=True, env=environment)
    check_same(companion_files(snapshot, AutoTokenizer.from_pretrained(snapshot)), run / "quantized")


def test_a_model_without_them_gets_those_of_transformers(tmp_path: Path) -> None:
    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"
    (model / "generation_config.json").unlink()
    assert main(compress_command(model, run)) == 0
    assert json.loads((run / "quantized" / "generation_config.json").read_text())["eos_token_id"] == 257
    shutil.rmtree(model)
    assert load_quantized(run / "quantized", None).tokenizer.eos_token_id == 257  # type: ignore[arg-type]
