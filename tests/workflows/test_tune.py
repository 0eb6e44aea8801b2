"""tune from options to the run folder: what is chosen and by which rows, interruption, --eval_only, bad input."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble import files
from nybble.cli.main import main
from nybble.data import sampling
from nybble.errors import DataError, RunError
from nybble.models import quantized_file, quantized_model
from nybble.nls import ranks
from nybble.run import resume
from nybble.run.results import Phase, read_results
from nybble.tasks import encoding, likelihood, objective, scoring
from nybble.workflows import plan, task_run
from nybble.workflows.tune import tune
from tests.helpers.copies import copy_run
from tests.helpers.distill import interrupt_after
from tests.helpers.distill import shipped_bytes as codes
from tests.helpers.tiny import save_model
from tests.helpers.tune import save_taught_model as taught
from tests.helpers.tune import tune_options as options
from tests.helpers.tune import write_letters as write_task
from tests.helpers.tune import write_words


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, the task and a run of two epochs, for tests that change none of them."""
    folder = tmp_path_factory.mktemp("finished")
    tune(options(folder))
    return folder


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned the letters, which is only read."""
    folder = tmp_path_factory.mktemp("learned")
    tune(options(folder, epochs=4))
    return folder / "run"


def test_learns_the_task_and_takes_the_best_candidate(learned: Path) -> None:
    found = results(learned)
    losses = [row["loss"] for row in found["trainings"][0]["steps"]]
    assert len(losses) == 4 * (48 // 8)
    assert sum(losses[-6:]) < 0.5 * sum(losses[:6])
    assert found["models"]["tuned"]["task:letters acc"] > found["models"]["16bit"]["task:letters acc"]
    candidates = found["task"]["candidates"]
    assert [(row["why"].split(", ")[0], set(row["configuration"])) for row in candidates[:2]] == [
        ("median", {4}),
        ("largest", {8}),
    ]
    assert 2 <= len(candidates) <= 5  # and the most frequent, two of the least loss; equal ones are one
    assert len({tuple(row["configuration"]) for row in candidates}) == len(candidates)
    best = max(candidates, key=lambda row: row["score"])
    assert found["task"]["configuration"] == best["configuration"]
    assert best["behind"] == 0
    assert all(row["behind"] >= 0 for row in candidates)
    assert all(0 < row["score"] < 1 for row in candidates), "shares, not their logarithms"
    assert all(0 < row["loss"] < 1 for row in found["trainings"][0]["validation"])
    assert "| candidate | share | behind the best |" in (learned / "report.md").read_text()
    assert found["task"]["selected_on"] == "held_out"


def test_interrupted_and_resumed_ends_with_the_same_bits(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(7, patch)
        with pytest.raises(KeyboardInterrupt):
            tune(options(tmp_path))
    assert not (tmp_path / "run" / "quantized").exists()
    tune(options(tmp_path, resume=True))
    assert codes(tmp_path / "run") == codes(finished / "run")
    one, other = (results(folder / "run")["task"] for folder in (tmp_path, finished))
    assert one["configuration"] == other["configuration"]


def test_adapters_learn_before_there_are_4_bits(tmp_path: Path) -> None:
    tune(options(tmp_path, epochs=4, quantize="after", method="se+gptq"))
    found = results(tmp_path / "run")
    models = found["models"]
    assert list(models) == ["16bit", "tuned16", "compressed", "tuned"]
    likelihoods = {row: measured["task:letters log_likelihood"] for row, measured in models.items()}
    assert min(likelihoods["tuned16"], likelihoods["tuned"]) > likelihoods["16bit"] + 0.5
    assert likelihoods["tuned16"] != likelihoods["compressed"] != likelihoods["tuned"]
    assert found["trainings"][1]["validation"][-1]["loss"] < found["trainings"][1]["validation"][0]["loss"], (
        "scales and norms have learnt too"
    )
    assert models["tuned16"]["bytes"] == models["16bit"]["bytes"] > 2 * models["tuned"]["bytes"]
    assert len(found["trainings"][0]["steps"]) == 4 * (48 // 8)
    assert len(found["trainings"][1]["steps"]) == 48 // 8
    assert found["trainings"][1]["best_step"] > 0
    assert found["trainings"][0]["steps"][-1]["loss"] < 0.5 * found["trainings"][0]["steps"][0]["loss"]
    candidates = found["task"]["candidates"]
    assert [(row["why"].split(", ")[0], set(row["configuration"])) for row in candidates[:2]] == [
        ("median", {4}),
        ("largest", {8}),
    ]
    assert found["task"]["configuration"] == max(candidates, key=lambda row: row["score"])["configuration"]
    assert found["changes"]["codes_changed"] == 0
    assert (
        0
        < min(found["changes"]["layer_scales_moved"].values())
        < found["changes"]["scales_moved"]
        < max(found["changes"]["layer_scales_moved"].values())
    )
    written = (tmp_path / "run" / "report.md").read_text()
    assert "adapters" in written
    assert "scales and norms" in written
    assert not (tmp_path / "run" / "compress").exists()


def test_the_4_bits_are_those_of_the_merged_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed by rtn and not trained further, the codes are those of weight + 2 lora_b lora_a at these ranks."""
    from nybble.models import loading
    from nybble.quant.grid import min_max_qparams, quantize
    from nybble.quant.scheme import QuantScheme

    tune(options(tmp_path, epochs=1, quantize="after", scale_epochs=0, custom_rank_config=(8, 2)))
    weights, _ = quantized_file.load_weights(tmp_path / "run" / "quantized")
    adapters, _ = files.load_tensors(tmp_path / "run" / "best.safetensors")
    plain = loading.load(str(tmp_path / "model"), torch.float32, torch.device("cpu")).model
    scheme, moved = QuantScheme(group_size=64), 0
    for name, rank in (("model.layers.0.mlp.up_proj", 8), ("model.layers.1.self_attn.q_proj", 2)):
        weight = plain.get_submodule(name).weight.detach()
        merged = torch.addmm(weight, 2 * adapters[f"{name}.lora_b"][:, :rank], adapters[f"{name}.lora_a"][:rank])
        scale, zero = min_max_qparams(merged, scheme)
        assert torch.equal(weights[name].codes_OI, quantize(merged, scale, zero, scheme))
        moved += int((quantize(weight, scale, zero, scheme) != weights[name].codes_OI).sum())
    assert moved > 100
    assert len(results(tmp_path / "run")["trainings"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 15])
def test_interrupted_in_either_training_it_ends_with_the_same_bits(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"quantize": "after", "method": "se", "scale_epochs": 3}
    tune(options(tmp_path, output_dir=str(tmp_path / "undisturbed"), **changes))
    with monkeypatch.context() as patch:
        interrupt_after(steps, patch)
        with pytest.raises(KeyboardInterrupt):
            tune(options(tmp_path, **changes))
    assert (tmp_path / "run" / "scales-last.safetensors").exists() == (steps > 12), (
        "the adapters' are 12 steps, the scales' 18"
    )
    tune(options(tmp_path, resume=True, **changes))
    assert codes(tmp_path / "run") == codes(tmp_path / "undisturbed")
    resumed, undisturbed = (results(tmp_path / name) for name in ("run", "undisturbed"))
    assert resumed["task"]["configuration"] == undisturbed["task"]["configuration"]
    assert [row["loss"] for row in resumed["trainings"][1]["steps"]] == [
        row["loss"] for row in undisturbed["trainings"][1]["steps"]
    ]


@pytest.mark.parametrize("with_teacher", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_configuration_is_tried_aside(with_teacher: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It scores what a run with it ships, and changes nothing in the run."""
    changes: dict[str, Any] = {
        "quantize": "after",
        "method": "se",
        "task": str(write_words(tmp_path / "words.jsonl")),
        "epochs": 1,
    }
    changes |= {"teacher": str(taught(tmp_path))} if with_teacher else {}
    tune(options(tmp_path, **changes))
    before, model = results(tmp_path / "run"), codes(tmp_path / "run")
    tune(options(tmp_path, resume=True, eval_only=True, custom_rank_config=(2, 8), **changes))
    tune(options(tmp_path, resume=True, eval_only=True, **changes))
    after = results(tmp_path / "run")
    assert codes(tmp_path / "run") == model
    assert not (tmp_path / "run" / "trial").exists()
    tried, chosen = after["task"].pop("tested")
    assert before["task"].pop("tested") == []
    kept = before.keys() - {"seconds", "peak_memory_bytes", "command_line", "resumed_by"}
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    scored = "task:words log_likelihood"
    assert chosen["value"] == after["models"]["tuned"][scored]
    assert chosen["configuration"] == after["task"]["configuration"] != tried["configuration"] == [2, 8]
    tune(options(tmp_path, output_dir=str(tmp_path / "other"), custom_rank_config=(2, 8), **changes))
    shipped = results(tmp_path / "other")["models"]
    assert tried["value"] == pytest.approx(shipped["tuned"][scored], abs=1e-6), (
        "the layers in place and the saved model add up in another order"
    )
    assert abs(shipped["tuned"][scored] - shipped["compressed"][scored]) > 1e-4
    assert "words.jsonl at ranks 2 8: log_likelihood" in capsys.readouterr().out


@pytest.mark.slow
def test_other_ranks_on_resume_make_all_of_4_bits_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"quantize": "after", "method": "se", "scale_epochs": 3}
    with monkeypatch.context() as patch:
        interrupt_after(15, patch)
        with pytest.raises(KeyboardInterrupt):
            tune(options(tmp_path, custom_rank_config=(8, 8), **changes))
    tune(options(tmp_path, custom_rank_config=(2, 2), resume=True, **changes))
    tune(options(tmp_path, custom_rank_config=(2, 2), output_dir=str(tmp_path / "other"), **changes))
    assert codes(tmp_path / "run") == codes(tmp_path / "other")
    assert results(tmp_path / "run")["models"] == results(tmp_path / "other")["models"]


@pytest.mark.slow
def test_scales_are_trained_once_a_step_whatever_the_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = objective.choice_loss

    def counted(*given: Any) -> objective.RowLoss:
        rows = original(*given)
        return objective.RowLoss(lambda indices: seen.append(len(indices)) or rows.loss(indices), rows.weight)  # type: ignore[func-returns-value]

    monkeypatch.setattr(objective, "choice_loss", counted)
    tune(options(tmp_path, quantize="after", rank_sampling="sandwich", epochs=1))
    assert sum(seen) == 3 * 48 + 48


@pytest.mark.slow
def test_what_the_way_of_the_adapters_does_not_use_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tune(options(tmp_path, epochs=1, norm_lr=5e-3))
    assert "--norm_lr has no effect with --quantize during" in caplog.text
    tune(options(tmp_path, epochs=1, quantize="after", scale_epochs=0, scale_lr=1e-4, overwrite=True))
    assert "--scale_lr has no effect with --quantize after and --scale_epochs 0" in caplog.text
    caplog.clear()
    tune(options(tmp_path, epochs=1, quantize="after", scale_lr=1e-4, norm_lr=0.0, overwrite=True))
    assert "no effect" not in caplog.text


def test_a_run_in_4_bits_is_no_start_for_adapters_before(finished: Path, tmp_path: Path) -> None:
    from nybble.errors import OptionError

    changes = {"quantize": "after", "method": "awq+se", "init_from": str(finished / "run")}
    with pytest.raises(OptionError, match="adapters are trained before that with --quantize after"):
        tune(options(tmp_path, output_dir=str(tmp_path / "other"), **changes))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("start", [pytest.param("rtn", marks=pytest.mark.slow), "se"])
@pytest.mark.slow
def test_one_configuration_is_measured_alike_fast_and_slow(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nybble.qat.fake_quant_lora import FakeQuantizedLoRALinear

    tune(options(tmp_path, method=start, weight_cache="recompute"))
    before = codes(tmp_path / "run")
    made: list[Counter[int]] = []
    scores: list[scoring.QuestionScores] = []
    original, score = FakeQuantizedLoRALinear.fake_quantized_OI, scoring.score_questions
    monkeypatch.setattr(
        FakeQuantizedLoRALinear, "fake_quantized_OI", lambda self: made[-1].update([self.active_rank]) or original(self)
    )  # type: ignore[func-returns-value]
    monkeypatch.setattr(scoring, "score_questions", lambda *given: scores.append(score(*given)) or scores[-1])  # type: ignore[func-returns-value]
    for changes in (
        {"fast_eval": False, "custom_rank_config": (8, 2)},
        {"fast_eval": True, "custom_rank_config": (8, 2)},
        {},
    ):
        made.append(Counter())
        tune(options(tmp_path, method=start, resume=True, eval_only=True, **changes))
    found = results(tmp_path / "run")
    slow, fast, chosen = found["task"]["tested"]
    assert slow["configuration"] == fast["configuration"] == [8, 2]
    assert made[1] == {8: 7, 2: 7}, "fast: every weight is made once"
    assert made[0].keys() == {8, 2}
    assert min(made[0].values()) > 7, "slow: again in every forward"
    assert scores[0] == scores[1]
    assert scores[2].log_likelihood == pytest.approx(found["models"]["tuned"]["task:letters log_likelihood"], abs=1e-4)
    assert slow["value"] == fast["value"]
    assert chosen["configuration"] == found["task"]["configuration"]
    assert chosen["value"] == found["models"]["tuned"]["task:letters acc"], (
        "the adapters in place and the absorbed model are the same"
    )
    assert codes(tmp_path / "run") == before
    assert "letters.jsonl at ranks 8 2: acc" in capsys.readouterr().out


@pytest.mark.slow
def test_candidates_before_the_rounding_score_alike_fast_and_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nybble.qat.lora import LoRALinear

    found, calls = [], Counter[str]()
    made = LoRALinear.compute_weight
    for name, fast in (("slow", False), ("fast", True)):

        def loss_mask(layer: LoRALinear, name: str = name) -> torch.Tensor:
            calls[name] += 1
            return made(layer)

        monkeypatch.setattr(LoRALinear, "compute_weight", loss_mask)
        tune(
            options(
                tmp_path,
                quantize="after",
                method="se",
                epochs=1,
                weight_cache="recompute",
                fast_eval=fast,
                output_dir=str(tmp_path / name),
            )
        )
        found.append(results(tmp_path / name))
    slow, fast_one = found
    assert slow["task"]["candidates"] == fast_one["task"]["candidates"]
    assert slow["trainings"][0]["validation"] == fast_one["trainings"][0]["validation"]
    assert calls["fast"] < calls["slow"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "metric"), [("openbookqa", "acc_norm"), ("hellaswag", "acc_norm"), ("gsm8k", "exact_match,strict-match")]
)
def test_tasks_of_lm_eval_go_through_the_whole_flow(
    task: str, metric: str, tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real rows; the two commands that people type, the second with ranks of its own."""
    save_model(tmp_path / "model", "smollm", max_position_embeddings=8192)  # a token a letter
    changes: dict[str, Any] = {
        "task": task,
        "data_dir": str(shared_data),
        "num_train_samples": 16,
        "epochs": 1,
        "limit": 3,
        "num_selection_samples": 6,
    }
    changes |= {
        "quantize": "after",
        "method": "se",
        "seq_len": 512,
        "eval_batch_size": 4,
        "select_on": "test" if task == "openbookqa" else "held_out",
    }
    tune(options(tmp_path, **changes))
    found = results(tmp_path / "run")
    column = f"task:{task} {metric}"
    assert found["task"]["metric"] == metric
    assert all(found["models"][row][f"documents:{task}"] == 3 for row in ("16bit", "tuned16", "compressed", "tuned"))
    on_test = [row["test"] is not None for row in found["task"]["candidates"]]
    assert all(on_test) == any(on_test) == (task == "openbookqa")
    assert "on the first 3 documents only (--limit)" in (tmp_path / "run" / "report.md").read_text()
    tune(options(tmp_path, resume=True, eval_only=True, **changes))
    tune(options(tmp_path, resume=True, eval_only=True, custom_rank_config=(2, 8), **changes))
    shipped, tried = results(tmp_path / "run")["task"]["tested"]
    assert shipped["value"] == found["models"]["tuned"][column]
    assert tried["configuration"] == [2, 8]
    assert 0 <= tried["value"] <= 1
    assert f"{task} at ranks 2 8: {metric}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["step", "recompute"])
def test_epochs_are_judged_at_the_middle_configuration(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nybble.qat.fake_quant_lora import FakeQuantizedLoRALinear

    quantized_at: list[int] = []
    original, score = FakeQuantizedLoRALinear.fake_quantized_OI, scoring.score_questions
    seen: list[set[int]] = []

    def spy(self: FakeQuantizedLoRALinear) -> torch.Tensor:
        quantized_at.append(self.active_rank)
        return original(self)

    def scored(model: Any, *arguments: Any) -> Any:
        if cache == "recompute":
            quantized_at.clear()
        found = score(model, *arguments)
        seen.append(set(quantized_at[-14:]))
        return found

    monkeypatch.setattr(FakeQuantizedLoRALinear, "fake_quantized_OI", spy)
    monkeypatch.setattr(scoring, "score_questions", scored)
    tune(options(tmp_path, weight_cache=cache, num_min_loss_configs=0, epochs=1))
    own_task = seen[2:4]  # after 16 bit and compressed, which are scored as models: the start and the epoch
    assert own_task == [{4}, {4}]


@pytest.mark.slow  # an export
@pytest.mark.usefixtures("needs_openvino")
def test_a_task_of_ones_own_is_scored_on_the_export_too(tmp_path: Path) -> None:
    tune(options(tmp_path, epochs=1, export=("openvino",)))
    models = results(tmp_path / "run")["models"]
    assert models["openvino"]["task:letters acc"] == models["tuned"]["task:letters acc"]
    # float32 on both sides, in OpenVINO with the 8-bit activations that are deployed
    assert models["openvino"]["task:letters log_likelihood"] == pytest.approx(
        models["tuned"]["task:letters log_likelihood"], abs=0.2
    )


@pytest.mark.slow
def test_a_microbatch_holds_rows_of_like_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    path = tmp_path / "long-and-short.jsonl"
    rows = [{"prompt": "a b " * (1 + i * 7 % 5), "choices": ["a", "b"], "answer": i % 2} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    padded: list[list[int]] = []
    original = encoding.pad_batch
    monkeypatch.setattr(
        encoding,
        "pad_batch",
        lambda texts, *rest: padded.append([len(text.ids) for text in texts]) or original(texts, *rest),
    )  # type: ignore[func-returns-value]
    monkeypatch.setattr(
        scoring, "score_questions", lambda *arguments: scoring.QuestionScores((-1.0,), (True,))
    )  # it pads too
    tune(options(tmp_path, task=str(path), microbatch_size=0, epochs=1, objective="answer", device="cpu"))
    assert len(padded) == 12  # 48 rows
    assert {len(lengths) for lengths in padded} == {4}
    for first, second in zip(padded[::2], padded[1::2], strict=True):
        assert first + second == sorted(first + second)
        assert len(set(first + second)) > 1
    tune(options(tmp_path, task=str(path), microbatch_size=0, epochs=1, overwrite=True))
    assert resume.saved_options(tmp_path / "run")["microbatch_size"] == 8, (
        "choices, which share their beginnings, go together as far as memory allows"
    )


@pytest.mark.parametrize("teacher", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_choices_are_learnt_where_there_are_some(teacher: bool, learned: Path, tmp_path: Path) -> None:
    """The first loss is the compressed model's: -log of the right choice's share, or KL of shares to the teacher's."""
    from transformers import AutoModelForCausalLM

    from nybble.models.head import LMHead
    from nybble.tasks import sources
    from nybble.tasks.dataset import TaskRequest

    path = str(taught(tmp_path)) if teacher else None
    run = options(tmp_path, epochs=1, lr=1e-12, scale_lr=0.0, lora_rank_space=(8,), microbatch_size=3, teacher=path)
    tune(run)
    found = results(tmp_path / "run")["trainings"][0]["steps"][0]["loss"]
    task = sources.load_task(TaskRequest(run.task.task, None, 0, 0))
    student, tokenizer, _ = quantized_model.load_quantized(tmp_path / "run" / "quantized", torch.float32)
    asked = [task.train[i] for i in sampling.draw_order(len(task.train), 8, 0).tolist()]
    models = [student, AutoModelForCausalLM.from_pretrained(path)] if path else [student]
    texts = encoding.encode_choices(tokenizer, asked, 32)
    with torch.no_grad():
        log_probs = [likelihood.choice_log_probs(model, LMHead.of(model), texts) for model in models]
    shares = [values.double().log_softmax(-1) for values in log_probs]
    expected = (
        (shares[1].exp() * (shares[1] - shares[0])).sum(-1).mean() if path else -shares[0][:, 0].mean()
    )  # the right one is always the first
    assert found == pytest.approx(float(expected), rel=1e-4)

    if teacher:
        tune(options(tmp_path, epochs=6, teacher=path, overwrite=True))
    models = results(tmp_path / "run" if teacher else learned)["models"]
    before, after = (models[row] for row in ("compressed", "tuned"))
    assert after["task:letters log_likelihood"] > before["task:letters log_likelihood"] + 0.5
    assert after["task:letters acc"] == 1.0


@pytest.mark.slow
def test_questions_with_more_and_fewer_choices_follow_a_teacher(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    rows = [
        {"prompt": f"pick {chr(97 + i % 6)}", "choices": ["a", "b", "c"][: 2 + i % 2], "answer": i % 2}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tune(options(tmp_path, task=str(path), teacher=str(taught(tmp_path)), epochs=1))
    assert all(0 <= row["loss"] < 10 for row in results(tmp_path / "run")["trainings"][0]["steps"])


def test_a_single_rank_is_plain_lora(tmp_path: Path) -> None:
    tune(options(tmp_path, lora_rank_space=(4,), epochs=1))
    found = results(tmp_path / "run")
    assert [row["why"] for row in found["task"]["candidates"]] == ["the only one"]
    assert found["task"]["configuration"] == [4, 4]
    assert "clamped" not in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.slow
def test_a_rank_that_layers_are_too_narrow_for_is_said(tmp_path: Path) -> None:
    tune(options(tmp_path, lora_rank_space=(48,), epochs=1))
    assert "rank 48 is clamped in 4 layers that are narrower" in (tmp_path / "run" / "log.txt").read_text(), (
        "keys and values, 32 wide, of 2 layers"
    )


def test_a_start_that_was_kept_leaves_nothing_to_choose(tmp_path: Path) -> None:
    tune(options(tmp_path, lr=1e-12, scale_lr=1e-12, epochs=1))
    found = results(tmp_path / "run")
    assert found["trainings"][0]["best_step"] == 0
    assert [row["why"] for row in found["task"]["candidates"]] == ["median"]
    assert found["task"]["configuration"] == [4, 4]


@pytest.mark.slow
def test_sandwich_trains_largest_smallest_and_random_in_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    original = ranks.activate_ranks

    def spy(layers: Any, configuration: Any) -> None:
        seen.append(configuration)
        original(layers, configuration)

    monkeypatch.setattr(ranks, "activate_ranks", spy)
    tune(options(tmp_path, rank_sampling="sandwich", epochs=1))
    first_step = seen[1:4]  # after the validation of the start
    assert first_step[:2] == [(8, 8), (2, 2)]
    assert first_step[2] == ranks.sample_configuration((8, 4, 2), 2, 0, 0)


@pytest.mark.slow
def test_half_trains_the_largest_every_other_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    original = ranks.activate_ranks
    monkeypatch.setattr(
        ranks,
        "activate_ranks",
        lambda layers, configuration: seen.append(configuration) or original(layers, configuration),
    )  # type: ignore[func-returns-value]
    tune(options(tmp_path, rank_sampling="half", epochs=1))
    steps = len(results(tmp_path / "run")["trainings"][0]["steps"])
    trained = seen[1 : 1 + steps]  # after the validation of the start
    assert steps > 3
    assert trained[::2] == [(8, 8)] * len(trained[::2])
    assert trained[1::2] == [ranks.sample_configuration((8, 4, 2), 2, 0, step) for step in range(1, steps, 2)]


@pytest.mark.slow
def test_a_candidate_of_least_loss_is_what_was_trained_at_that_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    original = ranks.activate_ranks
    monkeypatch.setattr(
        ranks,
        "activate_ranks",
        lambda layers, configuration: seen.append(configuration) or original(layers, configuration),
    )  # type: ignore[func-returns-value]
    tune(
        options(
            tmp_path,
            epochs=1,
            rank_sampling="random",
            lora_rank_space=(8, 7, 6, 5, 4, 3, 2, 1),
            num_min_loss_configs=6,
        )
    )
    found = results(tmp_path / "run")
    trained = seen[1:7]  # after the validation of the start
    order = sorted(range(6), key=lambda i: found["trainings"][0]["steps"][i]["loss"])
    expected = {f"least loss {k + 1}": list(trained[i]) for k, i in enumerate(order)}
    assert len(set(trained)) == 6
    reasons = {reason: row["configuration"] for row in found["task"]["candidates"] for reason in row["why"].split(", ")}
    assert {reason: ranks_ for reason, ranks_ in reasons.items() if reason.startswith("least loss")} == expected


def test_choosing_on_test_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test rows are made to contradict the held-out rows."""
    tasks: list[Any] = []
    likelihoods: list[float] = []
    load, score = task_run.load_task, scoring.score_questions

    def contradicting(*given: Any) -> scoring.QuestionScores:
        found = score(*given)
        if given[2][0] is tasks[0].scored[0]:
            return scoring.QuestionScores(found.log_likelihoods, (-likelihoods[-1],)) if likelihoods else found  # type: ignore[arg-type]
        likelihoods.append(found.score)
        return found

    monkeypatch.setattr(task_run, "load_task", lambda *given: tasks.append(load(*given)) or tasks[0])  # type: ignore[func-returns-value]
    monkeypatch.setattr(scoring, "score_questions", contradicting)
    tune(options(tmp_path, select_on="test", epochs=1))
    found = results(tmp_path / "run")
    assert found["task"]["selected_on"] == "test"
    assert "the ranks were chosen on the test rows" in " ".join(found["warnings"])
    candidates = found["task"]["candidates"]
    assert [row["test"] for row in candidates] == [-row["score"] for row in candidates]
    worst = min(candidates, key=lambda row: row["score"])
    assert worst["score"] < max(row["score"] for row in candidates)
    assert found["task"]["configuration"] == worst["configuration"]


def write_numbers(path: Path) -> Path:
    """No two rows alike."""
    path.write_text(
        "".join(json.dumps({"prompt": f"number {i}", "choices": ["a", "b"], "answer": 0}) + "\n" for i in range(60))
    )
    return path


@pytest.mark.slow
def test_epochs_and_ranks_are_chosen_on_the_selected_held_out_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nybble.tasks import sources
    from nybble.tasks.dataset import TaskRequest

    path, original = write_numbers(tmp_path / "numbers.jsonl"), scoring.score_questions
    loss_mask: Counter[frozenset[str]] = Counter()

    def spy(*given: Any) -> scoring.QuestionScores:
        loss_mask.update([frozenset(question.prompts[0] for question in given[2])])
        return original(*given)

    monkeypatch.setattr(scoring, "score_questions", spy)
    tune(options(tmp_path, task=str(path), num_selection_samples=4))
    task = sources.load_task(TaskRequest(str(path), None, 0, 0))
    held_out, scored = (frozenset(question.prompts[0] for question in part) for part in (task.held_out, task.scored))
    candidates = len(results(tmp_path / "run")["task"]["candidates"])
    assert candidates > 1
    assert len(loss_mask) == 2
    (selected,) = loss_mask.keys() - {scored}
    assert selected < held_out
    assert len(selected) == 4
    assert loss_mask == {scored: 3, selected: 1 + 2 + candidates}, (
        "16 bit, compressed and tuned; the start, the epochs and the candidates"
    )


@pytest.mark.parametrize(
    "what", [pytest.param("a wrong choice of the training rows", marks=pytest.mark.slow), "the teacher"]
)
def test_what_is_read_may_not_change_before_training_ends(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    teacher = taught(tmp_path)
    task, lines = tmp_path / "letters.jsonl", (tmp_path / "letters.jsonl").read_text().splitlines()
    run = options(tmp_path, teacher=str(teacher))
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            tune(run)
    if what == "the teacher":
        save_model(teacher, "smollm", seed=7)
    else:
        task.write_text("\n".join([lines[0].replace('"#"', '"%"'), *lines[1:]]))
    with pytest.raises(
        RunError, match="the teacher changed" if what == "the teacher" else "the rows of the task changed"
    ):
        tune(options(tmp_path, teacher=str(teacher), resume=True))


@pytest.mark.slow
def test_long_prompts_of_choices_lose_their_beginnings_and_no_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nybble")
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": "x " * (2 + i % 20) + "pick", "choices": ["a", "b"], "answer": i % 2} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tune(options(tmp_path, task=str(path), epochs=1, seq_len=16))
    assert "48 rows to train on (objective choices)" in (tmp_path / "run" / "log.txt").read_text() + caplog.text
    assert "left out" not in caplog.text
    for kind, count in (("training", 48), ("held-out", 6), ("scored", 6)):
        words = rf"the prompts of \d+ of {count} {kind} rows lose their beginning, to fit into 16 tokens"
        assert len(re.findall(words, caplog.text)) == 1
    assert results(tmp_path / "run")["task"]["objective"] == "choices"
    assert len(results(tmp_path / "run")["trainings"][0]["steps"]) == 48 // 8


@pytest.mark.slow
def test_a_finished_run_keeps_its_ranks_and_its_rows(tmp_path: Path) -> None:

    tune(options(tmp_path, epochs=1))
    before = (tmp_path / "run" / "config.toml").read_text()
    with pytest.raises(RunError, match="is finished, with other ranks"):
        tune(options(tmp_path, epochs=1, resume=True, custom_rank_config=(2, 4)))
    assert (tmp_path / "run" / "config.toml").read_text() == before
    tune(options(tmp_path, epochs=1, resume=True))
    task = tmp_path / "letters.jsonl"
    task.write_text(task.read_text().replace('"#"', '"%"'))  # a wrong answer, which no training text holds
    with pytest.raises(RunError, match="the rows of the task changed"):
        tune(options(tmp_path, epochs=1, resume=True))


def test_only_a_run_whose_training_ended_is_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    interrupt_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        tune(options(tmp_path))
    assert (tmp_path / "run" / "best.safetensors").exists()
    with pytest.raises(RunError, match="its training did not end"):
        tune(options(tmp_path, resume=True, eval_only=True))


@pytest.mark.slow
def test_sandwich_counts_the_largest_and_the_smallest_as_trained_most(tmp_path: Path) -> None:
    tune(options(tmp_path, rank_sampling="sandwich", epochs=1, lora_rank_space=(8, 4)))
    found = results(tmp_path / "run")
    assert found["task"]["candidates"][0]["configuration"] in ([8, 8], [4, 4])
    later = found["trainings"][0]["steps"][1:]  # at the start all ranks are the same
    assert all(row["last_pass"] != row["loss"] for row in later)


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], *flags: str, task: str | None = None) -> str:
    base = options(tmp_path)
    arguments = [
        "tune",
        "--pretrained",
        base.model.pretrained,
        "--output_dir",
        str(tmp_path / "new"),
        "--task",
        task or base.task.task,
        "--export",
        "none",
        *flags,
    ]
    capsys.readouterr()
    assert main(arguments) == 2
    assert not (tmp_path / "new" / "results.json").exists()
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--lora_rank_space must be one or more ranks of at least 1" in refused(
        tmp_path, capsys, "--lora_rank_space", "0", "4"
    )
    assert "one rank for each of the 2 decoder layers; got 3" in refused(
        tmp_path, capsys, "--custom_rank_config", "32", "24", "16"
    )
    assert "from --lora_rank_space 32 24 16; got 5" in refused(tmp_path, capsys, "--custom_rank_config", "32", "5")
    assert "--eval_only needs --resume" in refused(tmp_path, capsys, "--eval_only")
    assert "otherwise nothing is trained" in refused(tmp_path, capsys, "--lr", "0", "--scale_lr", "0", "--norm_lr", "0")
    assert "otherwise nothing is trained" in refused(tmp_path, capsys, "--lr", "0", "--scale_epochs", "0")
    assert "otherwise nothing is trained" in refused(
        tmp_path, capsys, "--quantize", "during", "--lr", "0", "--scale_lr", "0"
    )
    assert "must be a run of nybble tune that was trained; it is none, or its training did not end" in refused(
        tmp_path, capsys, "--eval_only", "--resume"
    )
    assert "nothing.jsonl must be an existing file; there is nothing at this path" in refused(
        tmp_path, capsys, task=str(tmp_path / "nothing.jsonl")
    )
    (tmp_path / "wrong.jsonl").write_text('{"prompt": "x", "choices": ["a"], "answer": 0}\n')
    assert "row 1 must have prompt, choices" in refused(tmp_path, capsys, task=str(tmp_path / "wrong.jsonl"))
    assert "answers must have tokens within --seq_len 8; none of 16 has; the shortest prompt has" in refused(
        tmp_path, capsys, "--seq_len", "8", task=str(write_long(tmp_path))
    )
    assert "--batch_size must be at most the number of training rows; got 64 and 48 rows" in refused(
        tmp_path, capsys, "--batch_size", "64"
    )
    assert main(["tune", "--pretrained", "x"]) == 2
    assert "--task is required" in capsys.readouterr().err


def test_rows_are_read_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "load_model", lambda *given: pytest.fail("the model was loaded"))
    counted_from_1 = tmp_path / "counted-from-1.jsonl"
    counted_from_1.write_text('{"prompt": "x", "choices": ["a", "b"], "answer": 2}\n')
    with pytest.raises(DataError, match="row 1 must have .* answer .the index of the right choice, the first is 0"):
        tune(options(tmp_path, task=str(counted_from_1)))
    with pytest.raises(DataError, match="answers must have tokens within --seq_len 8"):
        tune(options(tmp_path, task=str(write_long(tmp_path)), seq_len=8))


def write_long(folder: Path) -> Path:
    (folder / "long.jsonl").write_text('{"prompt": "a prompt of many tokens", "completion": "and words"}\n' * 20)
    return folder / "long.jsonl"


def test_another_space_task_or_model_on_resume_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:

    copy_run(finished, tmp_path)
    with pytest.raises(RunError, match="--lora_rank_space was"):
        tune(options(tmp_path, resume=True, lora_rank_space=(8, 4)))
    with pytest.raises(RunError, match="--task was"):
        tune(options(tmp_path, resume=True, task=str(write_task(tmp_path / "other.jsonl"))))
    with pytest.raises(RunError, match="--pretrained was"):
        tune(options(tmp_path, resume=True, pretrained=str(save_model(tmp_path / "another", "smollm", seed=7))))
    save_model(tmp_path / "model", "smollm", seed=7)
    with pytest.raises(RunError, match="the model changed"):
        tune(options(tmp_path, resume=True))
    capsys.readouterr()
    monkeypatch.delattr("nybble.models.loading.load")  # it is found before the model is loaded
    assert (
        main(["tune", "--config", str(tmp_path / "run" / "config.toml"), "--resume", "--lora_rank_space", "8", "4"])
        == 2
    )
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--lora_rank_space was" in line


def test_answers_of_ones_own_words(tmp_path: Path) -> None:
    from nybble.errors import OptionError

    path = write_words(tmp_path / "words.jsonl")
    tune(options(tmp_path, task=str(path), epochs=2))
    found = results(tmp_path / "run")
    models = found["models"]
    assert models["tuned"]["task:words log_likelihood"] > models["compressed"]["task:words log_likelihood"]
    assert found["task"]["candidates"][0]["accuracy"] is None
    assert "| candidate | log-likelihood | behind the best |" in (tmp_path / "run" / "report.md").read_text()
    assert torch.isfinite(torch.tensor([row["score"] for row in found["task"]["candidates"]])).all()
    with pytest.raises(OptionError, match="--objective choices needs a task whose rows all have choices"):
        tune(options(tmp_path, task=str(path), objective="choices", overwrite=True))


def test_a_teacher_is_followed(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from nybble.models.head import LMHead, last_hidden_states
    from nybble.tasks import sources
    from nybble.tasks.dataset import TaskRequest
    from nybble.training.losses import kl_to_teacher

    path = taught(tmp_path)
    followed: dict[str, Any] = {
        "epochs": 3, "teacher": str(path), "lora_rank_space": (8,), "microbatch_size": 8, "scale_lr": 0.0,
        "objective": "answer",
    }  # fmt: skip
    tune(options(tmp_path, **followed))
    found = results(tmp_path / "run")
    losses = [row["loss"] for row in found["trainings"][0]["steps"]]
    assert sum(losses[-6:]) < 0.5 * sum(losses[:6])
    assert found["models"]["tuned"]["task:letters acc"] > found["models"]["16bit"]["task:letters acc"]

    tune(options(tmp_path, overwrite=True, **followed))
    again = results(tmp_path / "run")["trainings"][0]["steps"]
    assert [row["loss"] for row in again] == losses, "followed with --overwrite too"

    # The first loss is the KL of the compressed model to the teacher on the answers of the first batch.
    teacher = AutoModelForCausalLM.from_pretrained(path)
    compressed = options(
        tmp_path, output_dir=str(tmp_path / "other"), epochs=1, lr=1e-12, scale_lr=0.0, objective="answer"
    )
    tune(compressed)
    student, tokenizer, _ = quantized_model.load_quantized(tmp_path / "other" / "quantized", torch.float32)
    task = sources.load_task(TaskRequest(compressed.task.task, None, 0, 0))
    texts = encoding.encode_right_answers(tokenizer, task.train, compressed.task.seq_len)
    batch = encoding.pad_batch([texts[i] for i in sampling.draw_order(len(texts), 8, 0).tolist()])
    with torch.no_grad():
        states = [last_hidden_states(model, batch.ids)[batch.loss_mask] for model in (student, teacher)]
        expected = kl_to_teacher(*states, LMHead.of(student), LMHead.of(teacher))
    assert losses[0] == pytest.approx(float(expected), rel=1e-4)


def test_a_teacher_must_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "wider", "smollm", vocab_size=300)
    assert "--teacher must have the vocabulary of --pretrained, 260 tokens;" in refused(
        tmp_path, capsys, "--teacher", str(tmp_path / "wider")
    )
    assert f"--teacher {tmp_path}/nowhere must be a model folder" in refused(
        tmp_path, capsys, "--teacher", f"{tmp_path}/nowhere"
    )


def test_other_ranks_are_refused_while_those_of_a_search_are_put_in_place(finished: Path, tmp_path: Path) -> None:
    copy_run(finished, tmp_path)
    found = read_results(tmp_path / "run")
    assert found.task is not None
    found.task.replaced_by_search, found.phase = True, Phase.REPLACING
    found.save(tmp_path / "run")
    layers = len(found.task.configuration or ())
    with pytest.raises(RunError, match="is getting the ranks that nybble search found"):
        tune(options(tmp_path, resume=True, custom_rank_config=(2,) * layers))


def test_a_task_has_another_name_than_those_of_lm_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_task(tmp_path / "openbookqa.jsonl")
    assert "openbookqa.jsonl must have another name than the tasks of --eval_tasks" in refused(
        tmp_path, capsys, "--task", str(tmp_path / "openbookqa.jsonl"), "--eval_tasks", "openbookqa"
    )


def test_the_scales_follow_the_teacher_again_where_the_model_was_lost(tmp_path: Path) -> None:
    given = options(tmp_path, quantize="after", epochs=1, teacher=str(taught(tmp_path)))
    tune(given)
    run, before = tmp_path / "run", codes(tmp_path / "run")
    (run / "quantized" / "weights.safetensors").unlink()
    for name in run.glob("scales-*.safetensors"):
        name.unlink()
    tune(given.replace(resume=True))
    assert codes(run) == before


def test_overwriting_spares_the_task_and_its_data(finished: Path, tmp_path: Path) -> None:
    from nybble.errors import OptionError

    copy_run(finished, tmp_path)
    inside = write_task(tmp_path / "run" / "letters.jsonl")
    with pytest.raises(OptionError, match="--overwrite would delete --task"):
        tune(options(tmp_path, task=str(inside), overwrite=True))
    with pytest.raises(OptionError, match="--overwrite would delete --data_dir"):
        tune(options(tmp_path, data_dir=str(tmp_path / "run"), overwrite=True))
    assert inside.exists()


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nybble.errors import OptionError

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="nybble tune must run in one process when Python calls it"):
        tune(options(tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_command_is_not_gone_on_with(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["distill", "--pretrained", str(finished / "model"), "--output_dir", str(finished / "run"), "--resume"]
    assert main(given) == 2
    assert "--resume must continue a run of nybble distill" in capsys.readouterr().err
