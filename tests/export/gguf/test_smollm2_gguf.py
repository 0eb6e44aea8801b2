"""The real model as a GGUF file: exact weights, llama.cpp's logits and tokens, and a chat with llama-server."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.export.base import EXPORTERS
from nybble.models import loading
from nybble.models.loading import LoadedModel
from nybble.models.quantized_model import save_quantized
from nybble.quant.scheme import QuantScheme
from tests.export.gguf.conftest import Exported
from tests.helpers.rounding import round_model_to_nearest
from tests.helpers.tokenizers import random_texts

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


@pytest.fixture(scope="module")
def exported(needs_llama_cpp: None, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """SmolLM2-135M-Instruct, rounded to nearest in groups of 64."""
    from nybble.models.checkpoint import open_checkpoint

    folder = tmp_path_factory.mktemp("smollm2")
    loaded = loading.load("smollm2", torch.float32, torch.device("cpu"))
    quantized = round_model_to_nearest(loaded.model, QuantScheme(group_size=64))
    save_quantized(folder / "quantized", LoadedModel(loaded.model, loaded.tokenizer, "smollm2"), quantized)
    checkpoint = open_checkpoint(folder / "quantized")
    (folder / "gguf").mkdir()
    return Exported(checkpoint, folder / "gguf", EXPORTERS["gguf"].export(checkpoint, folder / "gguf"))


def test_the_export_is_exact(exported: Exported) -> None:
    result = exported.result
    assert (result.linear_weights, result.embedding_weights, result.rounded) == (210, 1, {})
    assert result.logit_difference is not None
    assert result.logit_difference <= 1e-3  # of logits up to 40
    assert result.bytes < 0.74 * 134_515_008


def test_a_deployed_model_loses_little_to_8_bit_activations(exported: Exported, shared_data: Path) -> None:
    text = (shared_data / "wikitext/wikitext-2-raw/wiki.test.raw").read_text()[:4000]
    ids = exported.checkpoint.tokenizer(text, return_tensors="pt").input_ids[:, :512]
    with torch.no_grad():
        expected = exported.checkpoint.build()(ids).logits.log_softmax(-1)
    found = EXPORTERS["gguf"].open_model(exported.folder, exported.checkpoint.config)(ids).logits.log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    assert 1e-4 < float(divergence) < 1e-2


def test_llama_cpp_reads_texts_as_the_original_tokenizer(exported: Exported, shared_data: Path) -> None:
    from nybble.export.gguf.llama_cpp import LlamaModel

    tokenizer, model = exported.checkpoint.tokenizer, LlamaModel(exported.folder / "model.gguf", vocab_only=True)
    texts = (shared_data / "wikitext/wikitext-2-raw/wiki.test.raw").read_text().splitlines()[:200]
    texts += [
        json.loads(row)["question"] for row in (shared_data / "gsm8k/main/test.jsonl").read_text().splitlines()[:100]
    ]
    texts += random_texts(300)
    texts.append(tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True))
    assert [text for text in texts if model.tokenize(text) != tokenizer(text).input_ids] == []


def test_it_answers_as_torch_does(exported: Exported) -> None:
    checkpoint = exported.checkpoint
    prompt = checkpoint.tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    arguments = {"max_new_tokens": 12, "do_sample": False}
    strict = EXPORTERS["gguf"].open_model(exported.folder, checkpoint.config, strict=True)
    answer = strict.generate(**prompt, **arguments)
    assert torch.equal(answer, checkpoint.build().generate(**prompt, **arguments))
    deployed = EXPORTERS["gguf"].open_model(exported.folder, checkpoint.config)
    text = checkpoint.tokenizer.decode(deployed.generate(**prompt, **arguments)[0, prompt["input_ids"].shape[1] :])
    assert "capital of France" in text


@pytest.fixture(scope="module")
def ask(exported: Exported) -> Any:
    """llama-server on the file, on the loopback interface: (path, body) -> answer."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(exported.folder / "model.gguf")
    parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads, parameters.warmup = 512, 1, 1, False
    server = xllamacpp.Server(parameters)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{server.listening_address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with direct.open(request, timeout=60) as answer:
            return json.load(answer)

    return post


def test_llama_server_applies_the_chat_template_and_stops(exported: Exported, ask: Any) -> None:
    tokenizer = exported.checkpoint.tokenizer
    prompt = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert ask("/apply-template", {"messages": QUESTION})["prompt"] == prompt
    answer = ask("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 40, "temperature": 0})
    assert "capital of France" in answer["choices"][0]["message"]["content"]
    assert "<|im_end|>" not in answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] == len(tokenizer(prompt).input_ids)
