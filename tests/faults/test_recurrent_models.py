"""Models whose cache is a recurrent state: the choices of a task are scored and learnt without a shared prompt."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from nybble.models.head import LMHead
from nybble.tasks.encoding import EncodedAnswer
from nybble.tasks.likelihood import answer_losses, prefix_lengths
from nybble.workflows.tune import tune
from tests.helpers.tiny import make_tokenizer
from tests.helpers.tune import task_of, tune_options

COMMON: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "mamba_n_heads": 8,
    "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2, "num_heads": 8, "state_size": 16,
    "n_groups": 1, "pad_token_id": None,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "bamba": {"attn_layer_indices": [1]},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "mamba": {},
    "mamba2": {"expand": 2},
}


def make(kind: str) -> Any:
    config = CONFIG_MAPPING[kind](**COMMON | KINDS[kind])
    return AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_choices_are_scored_as_whole_texts(kind: str) -> None:
    model = make(kind)
    questions = [
        [EncodedAnswer([1, 2, 3, 4, *ending], 4) for ending in ([5], [6, 7])],
        [EncodedAnswer([9, 8, *ending], 2) for ending in ([5, 5], [7])],
    ]
    head = LMHead.of(model)
    losses = answer_losses(model, head, questions, prefix_lengths(model, head, questions))
    with torch.no_grad():
        for loss, text in zip(losses, (text for choices in questions for text in choices), strict=True):
            log_probs = model(torch.tensor([text.ids])).logits[0].log_softmax(-1)
            answer = range(text.prompt_length, len(text.ids))
            expected = -sum(float(log_probs[i - 1, text.ids[i]]) for i in answer)
            assert float(loss) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow  # trains
def test_a_task_is_learnt(tmp_path: Path) -> None:
    options = tune_options(tmp_path, group_size=32)
    model = Path(options.model.pretrained)
    for file in model.iterdir():
        file.unlink()
    make("lfm2").save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    tune(options)
    assert task_of(tmp_path / "run").configuration is not None
