"""Tables and summary of one run."""

import pytest

from nybble.qat.absorb import WeightChanges
from nybble.report.run import (
    decoder_rows,
    layer_rows,
    measured_on,
    recovered_share,
    result_rows,
    summary,
    validation_rows,
)
from nybble.run.results import RunResults, Training
from tests.helpers.runs import candidate, compressed, distilled, measured, metrics, task_results, tuned, with_everything


def test_recovered_is_a_share_of_the_compression_damage() -> None:
    models = distilled().models
    assert recovered_share(models, "tuned") == pytest.approx(0.75)
    assert recovered_share(models, "toy") == pytest.approx(0.5)
    assert recovered_share(models, "other") is None


def test_word_perplexity_goes_first_where_all_models_have_it() -> None:
    words = (20.0, 30.0, 29.0)
    full, start, end = ({"word_perplexity": value} for value in words)
    models = measured(distilled(), full=full, compressed=start, tuned=end).models
    assert recovered_share(models, "tuned") == pytest.approx(0.1)
    assert recovered_share(models, "toy") == pytest.approx(0.5)


def test_nothing_is_recovered_where_compression_did_no_damage() -> None:
    results = measured(distilled(), compressed={"token_perplexity": 9.9})
    assert recovered_share(results.models, "tuned") is None
    assert result_rows(results)[1][2][-1] == "-"
    assert "recovered" not in summary(results)


def test_the_table_of_results() -> None:
    headings, rows = result_rows(measured(distilled(), tuned={"task:arc_easy acc_norm": 0.4567}))
    assert headings == [
        "model", "token perplexity", "KL divergence to 16-bit", "arc_easy acc_norm", "size", "recovered",
    ]  # fmt: skip
    assert rows == [
        ["16-bit", "10.000", "0.0000", "-", "400.0 MB", "-"],
        ["INT4, compressed", "14.000", "0.5000", "-", "100.0 MB", "-"],
        ["INT4, distilled (torch)", "11.000", "0.2000", "0.4567", "100.0 MB", "75%"],
        ["INT4, distilled (Toy)", "12.000", "0.2500", "-", "110.0 MB", "50%"],
    ]


def test_runs_that_do_not_distill_have_no_column_recovered() -> None:
    assert "recovered" not in result_rows(compressed())[0]
    assert "recovered" not in result_rows(tuned({"16bit": 0.5}))[0]


def test_every_export_has_a_row() -> None:
    results = distilled()
    results.models["second"] = metrics(11.5, 0.2, 1)
    assert [row[0] for row in result_rows(results)[1]][-2:] == ["INT4, distilled (Toy)", "INT4, distilled (second)"]


def test_summary_of_a_distilled_run() -> None:
    assert summary(distilled()) == (
        "Small in INT4 (Toy) has token perplexity 12.00; it had 14.00 before training, and the 16-bit model has 10.00. "
        "Training recovered 50% of the compression damage. Training took 2.0 minutes. Size: 110 MB (16-bit: "
        "400 MB)."
    )
    worse = measured(distilled(), toy={"token_perplexity": 15.0})
    assert "lowered the KL divergence to the 16-bit model from 0.5000 to 0.2500, and not the perplexity." in summary(
        worse
    )
    assert "Training made it worse." in summary(measured(worse, toy={"kl_to_teacher": 0.6}))


def test_a_compressed_model_that_was_kept_recovered_nothing() -> None:
    results = distilled(trainings=[Training(best_step=0)])
    assert [row[-1] for row in result_rows(results)[1]] == ["-", "-", "0%", "0%"]
    assert "No step of the training was better; the compressed model was kept." in summary(results)
    assert "recovered" not in summary(results)


def test_small_sizes_and_times_have_digits() -> None:
    results = compressed(seconds={"compress": 250.0})
    for row in results.models.values():
        row["bytes"] = 260_000
    assert summary(results).endswith("Compression took 4.2 minutes. Size: 0.3 MB (16-bit: 0.3 MB).")


def test_a_method_for_some_blocks_says_so() -> None:
    assert (
        compressed(method="awq+se", limit_blocks=4).described_method
        == "awq+se (decoder blocks with it: the first 4; the rest rtn)"
    )
    assert compressed(method="rtn", limit_blocks=4).described_method == "rtn"


def test_beyond_the_16_bit_model_the_summary_gives_the_kl_divergence() -> None:
    better = measured(distilled(), toy={"token_perplexity": 9.5, "kl_to_teacher": 0.07})
    assert (
        "below the 16-bit model's perplexity; the KL divergence to the 16-bit model is 0.0700 (0.5000 before training)."
    ) in summary(better)


def test_summary_of_a_compressed_run() -> None:
    assert summary(compressed()) == (
        "Small compressed to INT4 with awq+se (torch) has token perplexity 12.50; the 16-bit model has 10.00. "
        "Compression took 5 s. Size: 100 MB (16-bit: 400 MB)."
    )


def test_summary_of_a_tuned_run() -> None:
    scores = {"16bit": 0.5, "tuned16": 0.8, "compressed": 0.6, "tuned": 0.7, "toy": 0.75}
    after = tuned(scores, seconds={"train": 120.0, "train scales": 60.0})
    assert summary(after).startswith(
        "Small in INT4 (Toy) has arc acc 0.7500; the 16-bit model has 0.8000 after tuning and 0.5000 before. Training "
        "took 3.0 minutes."
    )
    del scores["tuned16"]
    assert "has arc acc 0.7500; it had 0.6000 before training, and the 16-bit model has 0.5000." in summary(
        tuned(scores)
    )


def test_the_summary_says_that_ranks_were_chosen_by_its_score() -> None:
    scores = {"16bit": 0.5, "compressed": 0.4, "tuned": 0.6}
    candidates = [candidate("a", [8, 4]), candidate("b", [4, 4])]
    task = task_results(selected_on="test", chosen=[8, 4], configuration=[8, 4], candidates=candidates)
    assert "chosen by this score on the test rows" in summary(tuned(scores, task))
    task.configuration = [4, 4]
    assert "chosen by this score" not in summary(tuned(scores, task)), "another configuration ships"


def test_summary_of_16_bit_lora() -> None:
    results = tuned({"16bit": 0.5, "lora16": 0.9}, command="lora")
    assert summary(results) == "Small tuned in 16-bit with LoRA has arc acc 0.9000; it had 0.5000 before training."


@pytest.mark.parametrize("row", ["16bit", "compressed", "toy"])
def test_the_summary_of_an_unfinished_run_says_so(row: str) -> None:
    results = distilled()
    del results.models[row]["token_perplexity"]
    assert summary(results) == "Small: the run is not finished; continue it with --resume."


@pytest.mark.parametrize("results", [compressed(models={}), tuned({"lora16": 0.5}), tuned({"16bit": 0.5})])
def test_the_summary_of_a_run_without_all_models_says_so(results: RunResults) -> None:
    assert "is not finished" in summary(results)


def test_rows_of_layers() -> None:
    error = {"rtn": 0.02, "compressed": 0.01, "weight": 0.1, "clipped": 0.0}
    changes = WeightChanges(0.1, 0.1, {"q": 0.0123}, {"q": 0.0345, "k": 0.01})
    headings, rows = layer_rows(distilled(layer_errors={"q": error, "k": error | {"rtn": None}}, changes=changes))
    assert headings == [
        "layer", "output error, rtn", "output error, compressed", "weight error", "clipped",
        "codes changed by training", "scales moved by training",
    ]  # fmt: skip
    assert rows == [
        ["q", "2.000%", "1.000%", "10.00%", "0.000%", "1.23%", "3.45%"],
        ["k", "-", "1.000%", "10.00%", "0.000%", "-", "1.00%"],
    ]
    assert len(layer_rows(compressed(layer_errors={"q": error}))[0]) == 5, "nothing was trained"


def test_rows_of_decoder_layers() -> None:
    headings, rows = decoder_rows(with_everything())
    assert headings == [
        "decoder layer", "error, compressed", "error, distilled (torch)", "reconstruction error, before",
        "reconstruction error, after",
    ]  # fmt: skip
    assert rows[1] == ["1", "4.200%", "3.200%", "3.000%", "2.000%"]
    fewer = with_everything(block_losses={"model.layers.0": [0.02, 0.01]})
    assert decoder_rows(fewer)[1][1][-1] == "-", "fewer blocks were reconstructed (--limit_blocks)"
    assert decoder_rows(compressed()) == (["decoder layer"], [])


def test_rows_of_validations_leave_out_counts() -> None:
    training = Training(validation=[{"step": 4.0, "tokens": 100, "loss": 0.25, "accuracy": 0.5}])
    assert validation_rows(training) == (["step", "held-out loss", "accuracy"], [["4", "0.2500", "0.5000"]])


def test_the_note_names_text_and_limit() -> None:
    assert measured_on(distilled()) == (
        "Perplexity and KL divergence to the 16-bit model were measured on the test split."
    )
    results = distilled(test_data="held-out rows", limit=2)
    assert measured_on(results).endswith("were measured on held-out rows."), "there is nothing that has documents"
    results.models["tuned"]["word_perplexity"] = 30.0
    assert measured_on(results).endswith(" Word perplexity was measured on the first 2 documents only (--limit).")
    results.models["tuned"]["task:arc_easy acc"] = 0.5
    assert "Word perplexity and tasks were measured on the first 2 documents only (--limit)." in measured_on(results)
