"""nybble.evaluation.lm_eval_model: batch sizes, windows and progress of lm-eval's model object."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import PreTrainedConfig

from nybble.console import Advance
from nybble.errors import OptionError
from nybble.evaluation import lm_eval_model
from nybble.evaluation.lm_eval_model import default_batch_size, disable_inquiries, max_window, wrap_model
from nybble.models.layers_on_disk import layers_on_disk
from nybble.models.loading import load
from tests.helpers.tiny import make_model, make_tokenizer, save_model


def config(vocab_size: int = 32000, positions: int | None = None) -> PreTrainedConfig:
    return PreTrainedConfig(vocab_size=vocab_size, max_position_embeddings=positions)


def test_windows_are_limited_by_positions_and_by_the_published_length() -> None:
    assert max_window(config(positions=512)) == 512
    assert max_window(config(positions=100_000)) == 2048
    assert max_window(config(positions=None)) == 2048


def test_default_batch_size_keeps_the_logits_within_two_gibibytes() -> None:
    assert default_batch_size(config(256_000), 2048) == 1, "one request always goes in, here with 4.2 GB"
    assert default_batch_size(config(32_000), 2048) == (2 << 30) // (2 * 4 * 2048 * 32_000) == 4
    assert default_batch_size(config(260), 16) == 32


def request(context: str, answer: str) -> Instance:
    return Instance("loglikelihood", {}, (context, answer), 0, metadata=("toy", 0, 1))


def test_batch_size_follows_the_longest_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_model, "_LOGIT_BYTES", 2 * 4 * 260 * 48)
    model = wrap_model(make_model("llama"), make_tokenizer(), 0)
    model.loglikelihood([request("a", "b" * 15), request("c", "d")], disable_tqdm=True)
    assert model.batch_size == 3  # 48 / 16
    fixed = wrap_model(make_model("llama"), make_tokenizer(), 2)
    fixed.loglikelihood([request("a", "b" * 15), request("c", "d")], disable_tqdm=True)
    assert fixed.batch_size == 2


def test_only_whole_documents_have_the_published_window(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap_model(make_model("llama", max_position_embeddings=4096), make_tokenizer(), 1)
    seen = []
    monkeypatch.setattr(
        "lm_eval.models.huggingface.HFLM.loglikelihood_rolling",
        lambda self, *_, **__: seen.append(self.max_length) or [0],
    )
    model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("a",), 0, metadata=("toy", 0, 1))])
    assert (seen, model.max_length) == ([2048], 4096)


def test_a_task_that_generates_more_than_fits_is_refused() -> None:
    model = wrap_model(make_model("llama"), make_tokenizer(), 1)
    long = Instance("generate_until", {}, ("a", {"max_gen_toks": 300}), 0, metadata=("toy", 0, 1))
    with pytest.raises(OptionError, match="fewer tokens than the 256 positions of the model; toy generates up to 300"):
        model.generate_until([long])


def test_a_model_on_disk_has_the_scores_of_one_in_memory_and_is_read_once(tmp_path: Path) -> None:
    folder, cpu = save_model(tmp_path / "model", "gemma2"), torch.device("cpu")
    requests = [request("a", "b" * 15), request("Rain falls", " down"), request("c", "d"), request("Water is", " wet")]
    documents = [
        Instance("loglikelihood_rolling", {}, (text,), 0, metadata=("toy", 0, 1))
        for text in ("Water is wet. " * 40, "Rain")
    ]
    scores, read = [], list[int]()
    for offload in (False, True):
        loaded = load(str(folder), torch.float32, cpu, offload=offload)
        layers = layers_on_disk(loaded.model)
        for i in range(2 if layers else 0):
            assert layers is not None
            layers.replace(i, lambda i=i, original=layers._read[i]: read.append(i) or original())  # type: ignore[misc]
        model = wrap_model(loaded.model, loaded.tokenizer, 2)
        scores.append(model.loglikelihood(requests, disable_tqdm=True) + model.loglikelihood_rolling(documents))
    assert scores[0] == scores[1]
    assert read == [0, 1, 0, 1], "once for the answers and once for the documents"


def test_whole_documents_have_one_bar(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    bars: list[tuple[str, int, int]] = []

    @contextmanager
    def bar(title: str, total: int) -> Iterator[Advance]:
        done: list[int] = []
        yield lambda units, **texts: done.append(units)
        bars.append((title, total, sum(done)))

    monkeypatch.setattr(lm_eval_model, "bar", bar)
    documents = [
        Instance("loglikelihood_rolling", {}, (text,), 0, metadata=("toy", 0, 1)) for text in ("Water is wet.", "Rain")
    ]
    model = wrap_model(make_model("llama"), make_tokenizer(), 2)
    scores = model.loglikelihood_rolling(documents)
    assert bars == [("toy, documents", 2, 2)]
    assert "loglikelihood requests" not in capfd.readouterr().err
    assert scores == pytest.approx([model.loglikelihood_rolling([one])[0] for one in documents])
    assert scores[0] < scores[1] < 0, "the longer document is less likely"


def test_no_other_program_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import evaluator

    for name in ("get_git_commit_hash", "add_env_info"):  # restored afterwards
        monkeypatch.setattr(evaluator, name, getattr(evaluator, name))
    monkeypatch.setattr(subprocess, "Popen", None)
    disable_inquiries()
    about: dict[str, Any] = {}
    evaluator.add_env_info(about)
    assert not about
    assert evaluator.get_git_commit_hash() is None
