"""Perplexity and KL against torch's own losses; lm-eval on local data; exactly the same call for torch and exports."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nybble.cli.main import main
from nybble.console import Advance
from nybble.errors import DataError, OptionError
from nybble.evaluation import decoder_error, lm_eval, perplexity
from nybble.export import openvino
from nybble.models.head import LMHead, last_hidden_states
from tests.tiny import make_model, make_tokenizer


@pytest.mark.parametrize("chunk", [4, 256])
def test_perplexity_and_kl_equal_torch(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "_CHUNK", chunk)
    model, other, ids = make_model("llama"), make_model("llama", seed=1), torch.randint(0, 256, (3, 10))
    measured = perplexity.measure_sequences(
        perplexity.model_logits(model, ids), ids, perplexity.model_logits(other, ids)
    )
    z, t = model(ids).logits[:, :-1].double(), other(ids).logits[:, :-1].double()
    loss = F.cross_entropy(z.flatten(0, 1), ids[:, 1:].flatten())
    kl = F.kl_div(
        z.log_softmax(-1).flatten(0, 1), t.log_softmax(-1).flatten(0, 1), log_target=True, reduction="batchmean"
    )
    assert measured["token_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert measured["kl_to_teacher"] == pytest.approx(kl.item(), rel=1e-4)
    assert measured["tokens"] == 27


def test_states_give_the_models_own_logits() -> None:
    model, ids = make_model("gemma2"), torch.randint(0, 256, (2, 12))
    states = last_hidden_states(model, ids)
    measured = perplexity.measure_sequences(
        perplexity.model_logits(model, ids), ids, perplexity.logits_from_states(LMHead.of(model), states)
    )
    assert measured["kl_to_teacher"] == pytest.approx(0, abs=1e-6)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Two tasks in the hub's field names."""
    arc = tmp_path / "arc" / "ARC-Easy"
    arc.mkdir(parents=True)
    for split, rows in (("train", 3), ("validation", 2), ("test", 5)):
        question = {
            "question": "What is wet?",
            "choices": {"text": ["fire", "water", "sand"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        }
        (arc / f"{split}.jsonl").write_text("".join(json.dumps(question | {"id": str(i)}) + "\n" for i in range(rows)))
    pages = tmp_path / "wikitext" / "document_level"
    pages.mkdir(parents=True)
    (pages / "test.jsonl").write_text(json.dumps({"page": "= Water =\n\nWater is wet, and so is rain.\n"}) + "\n")
    return tmp_path


def test_lm_eval_tasks_run_on_local_files(data_dir: Path) -> None:
    results = lm_eval.run_tasks(
        make_model("llama"), make_tokenizer(), ["arc_easy", "wikitext"], batch_size=2, data_dir=str(data_dir)
    )
    assert results["arc_easy"]["acc"] in (0.0, 1.0)
    assert {"acc", "acc_norm"} <= results["arc_easy"].keys()
    assert results["arc_easy"]["right:acc"] == str(int(results["arc_easy"]["acc"])) * 5, "five times the same question"
    assert not any(key.startswith("right:") for key in results["wikitext"])
    assert lm_eval.result_columns(results)["right:arc_easy acc"] == results["arc_easy"]["right:acc"]
    assert results["wikitext"]["word_perplexity"] > 1


def test_documents_have_one_progress_bar(
    data_dir: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = json.dumps({"page": "= Water =\n\nWater is wet, and so is rain.\n"}) + "\n"
    (data_dir / "wikitext" / "document_level" / "test.jsonl").write_text(page * 3)
    titles: list[tuple[str, int]] = []

    @contextmanager
    def bar(title: str, total: int) -> Iterator[Advance]:
        done = []
        yield lambda units, **texts: done.append(units)
        titles.append((title, sum(done)))
        assert sum(done) == total

    monkeypatch.setattr(lm_eval, "bar", bar)
    monkeypatch.chdir(data_dir)  # no git repository
    capfd.readouterr()
    three = lm_eval.run_tasks(make_model("llama"), make_tokenizer(), ["wikitext"], batch_size=2, data_dir=str(data_dir))
    assert titles == [("wikitext, documents", 3)]
    said = capfd.readouterr().err
    assert "loglikelihood requests" not in said
    assert "fatal" not in said
    (data_dir / "wikitext" / "document_level" / "test.jsonl").write_text(page)
    one = lm_eval.run_tasks(make_model("llama"), make_tokenizer(), ["wikitext"], batch_size=2, data_dir=str(data_dir))
    assert three["wikitext"]["word_perplexity"] == pytest.approx(one["wikitext"]["word_perplexity"])


def test_all_files_of_a_split_are_read_each_by_its_own_kind(data_dir: Path) -> None:
    import datasets

    folder = data_dir / "arc" / "ARC-Easy"
    rows = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").rename(folder / "train-00000-of-00002.jsonl")
    (folder / "train-00001-of-00002.jsonl").write_text("".join(rows[:2]))
    datasets.Dataset.from_json(str(folder / "test.jsonl")).to_parquet(folder / "test.parquet")
    (folder / "test.jsonl").unlink()
    task = lm_eval.open_task("arc_easy", str(data_dir))
    assert (len(task.training_docs()), len(task.test_docs())) == (5, 5)


@pytest.mark.usefixtures("needs_openvino")
def test_the_same_call_measures_an_openvino_export(data_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    (tmp_path / "ov").mkdir()
    openvino.export(model, tokenizer, {}, tmp_path / "ov")
    exported = openvino.open_model(tmp_path / "ov", model.config, strict=True)
    ours, its = (
        lm_eval.run_tasks(m, tokenizer, ["arc_easy", "wikitext"], 2, data_dir=str(data_dir)) for m in (exported, model)
    )
    assert ours["wikitext"]["word_perplexity"] == pytest.approx(its["wikitext"]["word_perplexity"], rel=1e-4)
    assert ours["arc_easy"] == its["arc_easy"]


def test_missing_local_data_says_where_to_put_it(data_dir: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"must hold the data of winogrande in .*winogrande_xl \(files named train, validation; .jsonl or .parquet\)",
    ):
        lm_eval.check_tasks(["winogrande"], str(data_dir))
    folder = data_dir / "winogrande" / "winogrande_xl"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("{}\n")
    with pytest.raises(
        DataError,
        match=r"winogrande is scored on the split validation; put validation.jsonl into .*winogrande_xl, which has none",
    ):
        lm_eval.check_tasks(["winogrande"], str(data_dir))
    (data_dir / "arc" / "ARC-Easy" / "train.jsonl").unlink()
    lm_eval.check_tasks(["arc_easy"], str(data_dir))
    with pytest.raises(
        DataError, match=r"arc_easy is trained on the split train; put train.jsonl into .*ARC-Easy, which has none"
    ):
        lm_eval.open_task("arc_easy", str(data_dir))
    (data_dir / "arc" / "ARC-Easy" / "train.jsonl").write_text("")
    with pytest.raises(DataError, match=r"train.jsonl must have rows; it has none"):
        lm_eval.open_task("arc_easy", str(data_dir))


def test_decoder_errors_begin_where_something_is_wrong() -> None:
    model = make_model("smollm")
    ids = torch.randint(0, 256, (24,))
    wanted = decoder_error.decoder_outputs(model, ids)
    assert wanted.shape == (2, 24, model.config.hidden_size)
    assert decoder_error.decoder_errors(model, ids, wanted) == [0.0, 0.0]
    model.model.layers[1].mlp.down_proj.weight.data.mul_(2)
    first, second = decoder_error.decoder_errors(model, ids, wanted)
    assert first == 0.0
    ours = model.model(ids[None]).last_hidden_state[0].double()
    theirs = wanted[1].double()
    assert second == pytest.approx(float((((ours - theirs) ** 2).sum(-1) / (theirs**2).sum(-1)).mean()), rel=1e-4)


def test_splits_may_have_names_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "anli"
    folder.mkdir()
    for split, label in (("train_r1", 0), ("train_r2", 1), ("dev_r1", 2)):
        row = {"premise": "p", "hypothesis": split, "label": label}
        (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(
        DataError, match=r"anli_r1 is scored on the split test_r1; put test_r1.jsonl into .*anli, which has none"
    ):
        lm_eval.check_tasks(["anli_r1"], str(tmp_path))
    (folder / "test_r1.jsonl").write_text('{"premise": "p", "hypothesis": "test_r1", "label": 0}\n')
    lm_eval.check_tasks(["anli_r1"], str(tmp_path))
    task = lm_eval.open_task("anli_r1", str(tmp_path))
    assert [
        [row["hypothesis"] for row in rows()] for rows in (task.training_docs, task.validation_docs, task.test_docs)
    ] == [
        ["train_r1"],
        ["dev_r1"],
        ["test_r1"],
    ]


def test_a_misspelt_task_is_told_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "--pretrained", "m", "--tasks", "arc_esy", "--export"]) == 2
    assert "--tasks must be ones that lm-eval knows; got arc_esy; did you mean arc_easy" in capsys.readouterr().err
    with pytest.raises(
        OptionError, match="--compare must be ones that lm-eval knows; got 0000; lm-eval ls tasks shows them"
    ):
        lm_eval.open_task("0000", None, "--compare")


def test_groups_of_tasks_need_their_parts_named(data_dir: Path) -> None:
    with pytest.raises(
        OptionError, match="--tasks with --data_dir must name single tasks; ai2_arc is a group of tasks"
    ):
        lm_eval.check_tasks(["ai2_arc"], str(data_dir))


def test_columns_keep_filters_apart_and_leave_out_standard_errors() -> None:
    tasks = {
        "gsm8k": {
            "exact_match,strict-match": 0.1,
            "exact_match,flexible-extract": 0.2,
            "exact_match_stderr,strict-match": 0.01,
        },
        "wikitext": {"word_perplexity": 20.0, "bits_per_byte": 1.0},
    }
    assert lm_eval.result_columns(tasks) == {
        "task:gsm8k exact_match,strict-match": 0.1,
        "task:gsm8k exact_match,flexible-extract": 0.2,
        "word_perplexity": 20.0,
    }


def test_tasks_without_hub_and_without_local_data_name_the_choices() -> None:
    with pytest.raises(
        DataError,
        match="the Hugging Face hub cannot be reached; put train.jsonl, .* into FOLDER/arc/ARC-Easy and give --data_dir FOLDER, or leave them out",
    ):
        lm_eval.run_tasks(make_model("llama"), make_tokenizer(), ["arc_easy"])
