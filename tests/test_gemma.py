"""Gemma 3 270M from a GGUF file of Q4_K_M: a second real model, of another family, without a chat template.

It comes from PyPI in four parts (benchmarks/real_models.py) and is kept in build/models.
"""

from pathlib import Path

import pytest
import torch

from benchmarks import real_models
from nybble.cli.main import main
from nybble.export.base import EXPORTERS
from nybble.models import gguf, quantized_model
from nybble.models.gguf_file import read_gguf
from nybble.run.results import RunResults, read_results
from tests.helpers.llama_cpp import llama_tokenizer, texts_to_tokenize
from tests.helpers.strict_genai import strict_pipeline

pytestmark = pytest.mark.slow

MODELS = Path(__file__).resolve().parents[1] / "build" / "models"
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def file() -> Path:
    try:
        return real_models.fetch("gemma-3-270m", MODELS)
    except OSError as error:
        pytest.skip(f"Gemma 3 270M is not at hand: {error}")


@pytest.fixture(scope="module")
def run(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    arguments = "compress --data python-docs --seq_len 128 --method se --num_calibration_samples 8 --num_test_samples 4"
    arguments += " --eval_tasks none --export openvino gguf onnx"
    assert main([*arguments.split(), "--pretrained", str(file), "--output_dir", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def results(run: Path) -> RunResults:
    return read_results(run)


def test_tokenizes_as_llama_cpp(file: Path, shared_data: Path) -> None:
    tokenizer, llama = gguf.load_gguf_tokenizer(read_gguf(file)), llama_tokenizer(file)
    texts = texts_to_tokenize(shared_data)
    found = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert [text for text, ids in zip(texts, found, strict=True) if ids != llama(text, False)] == []
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id


def test_four_bits_lose_little_and_exports_nothing(results: RunResults) -> None:
    rows = results.models
    original, compressed = rows["16bit"]["token_perplexity"], rows["compressed"]["token_perplexity"]
    assert 5 < original < compressed < 2 * original
    assert rows["openvino"]["kl_to_teacher"] == pytest.approx(rows["compressed"]["kl_to_teacher"], rel=0.05)
    assert results.warnings == []
    for name in ("openvino", "gguf", "onnx"):
        export = results.exports[name]
        assert (export["linear_weights"], export["embedding_weights"]) == (126, 1)


@pytest.mark.parametrize(("name", "tolerance"), [("openvino", 1e-4), ("gguf", 1e-3), ("onnx", 1e-4)])
def test_every_runtime_computes_the_logits_of_torch(name: str, tolerance: float, run: Path) -> None:
    """GGUF holds the embedding of 8 bits per row in blocks of 32, each with a scale of its own."""
    model, tokenizer, _ = quantized_model.load_quantized(run / "quantized", torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(ids).logits
    found = EXPORTERS[name].open_model(run / name, model.config, strict=True)(input_ids=ids, use_cache=False).logits
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
    assert found[0, -1].argmax() == expected[0, -1].argmax()


def test_openvino_genai_continues_a_text_as_torch(run: Path) -> None:
    """The tokenizer of the export puts BOS before it, as the model was trained."""
    pipeline = strict_pipeline(run / "openvino")
    model, tokenizer, _ = quantized_model.load_quantized(run / "quantized", torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :])
    assert pipeline.generate(PROMPT, max_new_tokens=8, do_sample=False) == expected
