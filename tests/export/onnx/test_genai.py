"""onnxruntime-genai loads the folders and generates what torch generates."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.models.checkpoint import QuantizedCheckpoint, open_checkpoint
from nybble.models.loading import load
from nybble.models.quantized_model import save_quantized
from nybble.quant.scheme import QuantScheme
from tests.export.onnx.conftest import EXPORTER, Export
from tests.helpers.cases import fast_cases
from tests.helpers.rounding import round_model_to_nearest
from tests.helpers.tiny import FAMILIES, FAST_FAMILIES

pytestmark = pytest.mark.usefixtures("needs_onnx")


def in_float32(folder: Path, copy: Path) -> Path:
    """A copy of an export whose products compute in float32."""
    import onnx

    shutil.copytree(folder, copy)
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    onnx.save(model, copy / "model.onnx")
    return copy


def open_genai(folder: Path) -> Any:
    """The model in onnxruntime-genai, with one thread."""
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}))
    return og.Model(config)


def generate(model: Any, ids: list[int], max_length: int, min_length: int = 0) -> list[int]:
    """The prompt and the tokens of the largest logits after it."""
    import onnxruntime_genai as og

    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=max_length, min_length=min_length, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


@pytest.mark.parametrize("family", fast_cases(FAMILIES, FAST_FAMILIES))
def test_genai_generates_the_tokens_of_torch(family: str, export: Export, tmp_path: Path) -> None:
    """Longer than the sliding windows, with caches that genai shares between past and present."""
    exported = export(family)
    model, genai = exported.checkpoint.build(), open_genai(in_float32(exported.folder, tmp_path / "onnx"))
    ids = torch.randint(0, 256, (1, 12))
    generated = torch.tensor([generate(genai, ids[0].tolist(), max_length=32, min_length=32)])
    with torch.no_grad():
        logits_TV = model(generated, use_cache=False).logits[0, 11:-1]
    logits_TV[:, 257] = -torch.inf  # no end before min_length
    best_TK = logits_TV.topk(2).values
    clear = (
        best_TK[:, 0] - best_TK[:, 1] > 1e-3
    )  # float32 may round the other way where two logits are as good as equal
    assert bool(clear[:4].all())
    assert torch.equal(generated[0, 12:][clear], logits_TV.argmax(-1)[clear])


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    """The real model, rounded to nearest in groups of 64."""
    loaded = load("smollm2", torch.float32, torch.device("cpu"))
    folder = tmp_path_factory.mktemp("smollm2") / "quantized"
    save_quantized(folder, loaded, round_model_to_nearest(loaded.model, QuantScheme(group_size=64)))
    return open_checkpoint(folder)


@pytest.mark.slow
def test_the_real_model_is_exact_and_answers_in_genai(smollm2: QuantizedCheckpoint, tmp_path: Path) -> None:
    import onnxruntime_genai as og

    folder = tmp_path / "onnx"
    folder.mkdir()
    result = EXPORTER.export(smollm2, folder)  # compares codes, scales, zero points and logits
    assert (result.linear_weights, result.embedding_weights, result.rounded) == (210, 1, {})
    assert result.logit_difference is not None
    assert result.logit_difference <= 1e-3
    assert result.bytes <= 0.70 * 134_515_008

    model = open_genai(folder)
    tokenizer = og.Tokenizer(model)
    texts = ["1234 and 3.14", "two  spaces\n\n x", "é 🙂 <|im_end|>", "def f(x):\n\treturn x  # 12"]
    assert [[int(i) for i in tokenizer.encode(text)] for text in texts] == smollm2.tokenizer(texts).input_ids
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
    assert prompt == smollm2.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = smollm2.tokenizer(prompt).input_ids
    answer = tokenizer.decode(generate(model, ids, max_length=len(ids) + 8)[len(ids) :])
    assert "Paris" in answer

    code = EXPORTER.usage.split("```python\n")[1].split("```")[0].replace("100)", "8)")
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert "Paris" in run.stdout, "the usage in the model card"

    exact = open_genai(in_float32(folder, tmp_path / "float32"))
    arguments = {"max_new_tokens": 8, "do_sample": False}
    assert (
        generate(exact, ids, max_length=len(ids) + 8)
        == smollm2.build().generate(torch.tensor([ids]), **arguments).flatten().tolist()
    )
