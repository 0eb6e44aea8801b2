"""LlamaCppModel compared with torch, the interface to llama.cpp, and its errors."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nybble.cli.main import main
from nybble.errors import ExportError
from nybble.export.base import EXPORTERS
from nybble.export.gguf import llama_cpp, runtime
from nybble.export.gguf.file import GGUFContent, write_floats
from tests.export.gguf.conftest import Exported
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.exports import check_generation, check_padding_and_windows
from tests.helpers.tiny import make_model
from tests.helpers.tokenizers import BYTE_LEVEL, byte_level_tokenizer


@pytest.fixture
def opened(export: Callable[..., Exported]) -> Callable[[str], tuple[Any, Any]]:
    """Open the export of a family: the torch model and llama.cpp in float32."""

    def open_family(family: str) -> tuple[Any, Any]:
        exported = export(family)
        config = exported.checkpoint.config
        return exported.checkpoint.build(), EXPORTERS["gguf"].open_model(exported.folder, config, strict=True)

    return open_family


@pytest.mark.parametrize("family", ["smollm", "qwen3", "phi3", "gemma2", "gemma3"])
def test_padding_and_sliding_windows(family: str, opened: Callable[[str], tuple[Any, Any]]) -> None:
    tolerance = 0.02 if family.startswith("gemma") else 1e-4  # the table of GELU in float16
    logits = check_padding_and_windows(*opened(family), tolerance)
    assert float(logits[1, :7].abs().max()) == 0


def test_a_sequence_of_padding_alone(opened: Callable[[str], tuple[Any, Any]]) -> None:
    _, llama = opened("smollm")
    mask = torch.tensor([[1, 1], [0, 0]])
    assert float(llama(torch.ones(2, 2, dtype=torch.int64), attention_mask=mask).logits[1].abs().max()) == 0


def test_generation_computes_each_token_once(opened: Callable[[str], tuple[Any, Any]]) -> None:
    check_generation(*opened("llama"))


def test_a_batch_with_padding_generates_what_each_sequence_does(opened: Callable[[str], tuple[Any, Any]]) -> None:
    model, llama = opened("qwen2")
    first, second = torch.randint(0, 256, (1, 9)), torch.randint(0, 256, (1, 5))
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 257}
    ids = torch.cat([first, torch.cat([torch.full((1, 4), 257), second], dim=1)])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    generated = llama.generate(ids, attention_mask=mask, **arguments)[:, 9:]
    expected = [model.generate(prompt, **arguments)[0, prompt.shape[1] :] for prompt in (first, second)]
    assert torch.equal(generated, torch.stack(expected))


def test_a_context_that_is_too_short_is_made_again(
    opened: Callable[[str], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text that continues beyond the first context; with phi3 the rotary factors change there, as in torch."""
    model, llama = opened("phi3")
    made, original = [], runtime.LlamaContext

    def context(model: Any, sequences: int, length: int, exact: bool) -> Any:
        made.append((sequences, length, exact))
        return original(model, sequences, length, exact)

    monkeypatch.setattr(runtime, "LlamaContext", context)
    ids = torch.randint(0, 256, (1, 300))
    output = llama(ids[:, :250], use_cache=True)
    parts = [output.logits]
    for i in range(250, 300, 25):
        output = llama(ids[:, i : i + 25], past_key_values=output.past_key_values)
        parts.append(output.logits)
    assert made == [(1, 256, True), (1, 512, True)]
    with torch.no_grad():
        torch.testing.assert_close(parts[0], model(ids[:, :250]).logits, rtol=0, atol=1e-3)
        torch.testing.assert_close(parts[-1], model(ids).logits[:, 275:], rtol=0, atol=1e-3)
        torch.testing.assert_close(llama(ids[:, :40]).logits, model(ids[:, :40]).logits, rtol=0, atol=1e-3)
    assert made[2:] == [(1, 256, True)]


def test_many_tokens_are_computed_in_parts(
    opened: Callable[[str], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "_LOGIT_BYTES", 50 * 4 * 260)
    model, llama = opened("smollm")
    ids = torch.randint(0, 256, (2, 120))
    with torch.no_grad():
        torch.testing.assert_close(llama(ids).logits, model(ids).logits, rtol=0, atol=1e-3)
    assert llama._context._most == 50


def test_a_strict_model_leaves_no_file(export: Callable[..., Exported]) -> None:
    exported = export("smollm")
    before = sorted(exported.folder.iterdir())
    llama = EXPORTERS["gguf"].open_model(exported.folder, exported.checkpoint.config, strict=True)
    assert sorted(exported.folder.iterdir()) == before
    assert torch.isfinite(llama(torch.arange(4)[None]).logits).all()


def test_the_float32_copy_holds_the_same_numbers_and_fields(export: Callable[..., Exported], tmp_path: Path) -> None:
    content = GGUFContent(export("llama").folder / "model.gguf")
    write_floats(content, tmp_path / "copy.gguf")
    copy = GGUFContent(tmp_path / "copy.gguf")
    assert copy.fields == content.fields
    assert copy.kinds == dict.fromkeys(content.kinds, "F32")
    for name in content.kinds:
        assert (copy.read(name) == content.read_floats(name)).all()


def test_no_room_for_the_float32_copy(export: Callable[..., Exported], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runtime, "write_floats", fail)
    exported = export("smollm")
    with pytest.raises(ExportError, match=r"--strict needs room for the weights .* \(OSError: .*No space left"):
        EXPORTERS["gguf"].open_model(exported.folder, exported.checkpoint.config, strict=True)


def test_a_file_that_llama_cpp_does_not_load_is_one_line(
    export: Callable[..., Exported], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = (export("smollm").folder / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))
    with pytest.raises(ExportError, match=r"must be a model that llama.cpp loads; it does not \(.*blk.1.attn_q.weight"):
        llama_cpp.LlamaModel(tmp_path / "model.gguf")
    assert capfd.readouterr() == ("", "")


def test_errors_of_a_context_and_of_tokens(export: Callable[..., Exported]) -> None:
    model = llama_cpp.LlamaModel(export("smollm").folder / "model.gguf")
    with pytest.raises(ExportError, match="llama.cpp must have memory for 100000 sequences of 8 tokens; it fails"):
        llama_cpp.LlamaContext(model, 100_000, 8, exact=False)
    context = llama_cpp.LlamaContext(model, 1, 256, exact=False)
    with pytest.raises(ExportError, match="llama.cpp must compute 1 tokens; it fails with status -1"):
        context.decode(0, [260], [0])


@pytest.mark.parametrize("struct", ["model", "context"])
def test_another_layout_of_the_structs_is_refused(struct: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a field were inserted: all later values are four bytes further."""
    pytest.importorskip("xllamacpp", reason="the extra gguf")
    kinds = {"model": llama_cpp._ModelParams, "context": llama_cpp._ContextParams}

    def shifted(kind: Any) -> Any:
        content = bytes(getattr(llama_cpp._library(), f"llama_{struct}_default_params")())
        return kind.from_buffer_copy((content[:16] + bytes(4) + content[16:])[: ctypes.sizeof(kind)])

    functions: dict[str, Any] = {name: _Function(None) for name in llama_cpp._FUNCTIONS}
    for name, kind in kinds.items():
        value = shifted(kind) if name == struct else getattr(llama_cpp._library(), f"llama_{name}_default_params")()
        functions[f"llama_{name}_default_params"] = _Function(value)
    library = SimpleNamespace(**functions)
    llama_cpp._library.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda path: library)
    with pytest.raises(
        ExportError, match=r"needs the llama.cpp of xllamacpp 2026.10.11549; xllamacpp \d.* has another"
    ):
        llama_cpp._library()
    monkeypatch.undo()
    llama_cpp._library.cache_clear()
    llama_cpp._library()


class _Function:
    """A C function without arguments."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self) -> Any:
        return self.value


def test_eval_measures_an_export_in_llama_cpp(
    export: Callable[..., Exported], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exported, strict = export("smollm"), []
    original = runtime.LlamaCppModel.__init__
    monkeypatch.setattr(
        runtime.LlamaCppModel,
        "__init__",
        lambda self, path, config, exact: strict.append(exact) or original(self, path, config, exact),
    )
    values = []
    for arguments in ([str(exported.checkpoint.folder)], [str(exported.folder), "--strict"], [str(exported.folder)]):
        command = ["eval", *arguments, "--data", "python-docs", "--seq_len", "64", "--num_samples", "4"]
        assert main([*command, "--eval_tasks", "none", "--dtype", "float32"]) == 0
        values.append(json.loads(capsys.readouterr().out.split("┘")[-1].split("┛")[-1])["token_perplexity"])
    assert strict == [True, False]
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert values[2] != values[1]
    assert values[2] == pytest.approx(values[0], rel=0.05)


def test_eval_of_a_gguf_file_uses_transformers(
    needs_llama_cpp: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_level_tokenizer(*BYTE_LEVEL["gpt-2"])
    checkpoint = save_checkpoint(tmp_path / "quantized", make_model("smollm", vocab_size=602), tokenizer=tokenizer)
    EXPORTERS["gguf"].write(EXPORTERS["gguf"].held(checkpoint), tmp_path)
    monkeypatch.setattr(runtime.LlamaCppModel, "__init__", None)
    command = ["eval", str(tmp_path / "model.gguf"), "--data", "python-docs", "--seq_len", "64"]
    assert main([*command, "--num_samples", "2", "--eval_tasks", "none", "--dtype", "float32"]) == 0
    assert "token_perplexity" in capsys.readouterr().out
