"""What commands ask of their text (options -> TextRequest), and whether the model can read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nybble.compression.methods import needs_calibration, parse_method
from nybble.data.generate import is_token_file
from nybble.data.mixture import Mixture
from nybble.data.prepare import TextData, prepare_text
from nybble.data.request import TextRequest, evaluation_sources
from nybble.data.sources import check_place, load_documents, prefix_source
from nybble.errors import DataError, HubUnreachableError, NybbleError
from nybble.evaluation.lm_eval import check_tasks
from nybble.options.commands import CompressOptions, DistillOptions, RunCommand
from nybble.options.compression import AUTO, MIN_CALIBRATION_SAMPLES, CompressionOptions
from nybble.options.data import TextOptions
from nybble.runtime import without_hub
from nybble.workflows.mixed_precision import num_sequences


def check_sources(tasks: tuple[str, ...], options: TextOptions) -> None:
    """Check that lm-eval tasks can be run. Where their data cannot be downloaded, the text that cannot be is named too.

    Raises:
        HubUnreachableError: the hub cannot be reached; all that is missing is named.
        DataError: there is nothing at the path of a source.
        NybbleError: see `check_tasks`.
    """
    named = {"--data": options.data, "--eval_data": options.eval_data, "--other_data": options.other_data}
    for option, names in named.items():
        for name in Mixture.parse(names, option).names if names else ():
            if options.data_dir is None or name.startswith((".", "/", "~")):  # others may lie in --data_dir
                check_place(name, option)
    try:
        check_tasks(tasks, options.data_dir)
    except HubUnreachableError as error:
        raise HubUnreachableError("; and ".join((str(error), *_missing_texts(options)))) from error


def _missing_texts(options: TextOptions) -> list[str]:
    """What is wrong with the sources of text that only the hub has, which was not reached."""
    trained = [prefix_source(name) or name for name in Mixture.parse(options.data).names]
    evaluated = Mixture.parse(evaluation_sources(options.data, options.eval_data), "--eval_data").names
    missing = []
    for name in dict.fromkeys((*trained, *evaluated)):
        if prefix_source(name) is not None or is_token_file(name):
            continue
        option = "--data" if name in trained else "--eval_data"
        try:
            with without_hub():
                load_documents(name, options.text_column, options.data_dir, (), option)
        except HubUnreachableError as error:
            missing.append(str(error))
        except NybbleError:  # the run says so once the hub is no obstacle
            continue
    return missing


@dataclass(frozen=True)
class ReadText:
    """Text that was read before the model, which may still decide on the method.

    Attributes:
        request: what the run asks for, depending on whether the method calibrates.
        tokenizer: of the model.
        calibrates: what the text was read for.
        data: the text.
    """

    request: Callable[[bool], TextRequest]
    tokenizer: Any
    calibrates: bool
    data: TextData

    def for_method(self, calibrates: bool) -> TextData:
        """The text once the method is known. It is read again where --method auto is rtn."""
        return self.data if calibrates == self.calibrates else prepare_text(self.request(calibrates), self.tokenizer)


def read_text(request: Callable[[bool], TextRequest], compression: CompressionOptions, tokenizer: Any) -> ReadText:
    """Read the text of a run before its model is loaded.

    Args:
        request: see ReadText.
        compression: says whether the method calibrates. --method auto does for all but a few models.
        tokenizer: of the model.

    Raises:
        DataError, OptionError, ModelError: see `prepare_text`.
    """
    calibrates = _may_calibrate(compression)
    try:
        return ReadText(request, tokenizer, calibrates, prepare_text(request(calibrates), tokenizer))
    except DataError as error:
        if compression.method != AUTO or not calibrates:
            raise
        prepare_text(request(False), tokenizer)  # raises what is wrong whatever the method is
        raise DataError(f"{error}; --method rtn needs no text to calibrate on") from error


def _may_calibrate(compression: CompressionOptions) -> bool:
    """Whether the compression needs text, as far as the options tell."""
    if getattr(compression, "init_from", None) is not None:
        return False
    return compression.method == AUTO or needs_calibration(parse_method(compression.method, "--method"))


def compression_request(options: CompressOptions, calibrates: bool) -> TextRequest:
    """Calibration text where the method needs it, and test text."""
    return _request(
        options.text,
        options.run.seed,
        num_calibration=_num_calibration(options, options.compression, options.text, calibrates),
        num_test=options.evaluation.num_test_samples,
    )


def distill_request(options: DistillOptions, calibrates: bool) -> TextRequest:
    """Text to train on, to calibrate with, to validate and to test."""
    training = options.training
    return _request(
        options.text,
        options.run.seed,
        num_train=training.num_train_samples * (1 if training.same_samples else training.epochs),
        num_generated=training.num_train_samples,
        num_calibration=_num_calibration(options, options.compression, options.text, calibrates),
        num_validation=training.num_validation_samples,
        num_test=options.evaluation.num_test_samples,
        min_train=training.batch_size,
    )


def _num_calibration(options: RunCommand, compression: CompressionOptions, text: TextOptions, calibrates: bool) -> int:
    return compression.num_calibration_samples if calibrates else num_sequences(options.scheme, text.seq_len)


def _request(options: TextOptions, seed: int, **counts: int) -> TextRequest:
    defaults = {"num_train": 0, "num_generated": 0, "num_calibration": 0, "num_validation": 0, "min_train": 0}
    return TextRequest(
        data=options.data,
        eval_data=options.eval_data,
        other_data=options.other_data,
        text_column=options.text_column,
        data_dir=options.data_dir,
        seq_len=options.seq_len,
        assistant_only=options.assistant_only_loss,
        min_calibration=MIN_CALIBRATION_SAMPLES,
        seed=seed,
        **defaults | counts,
    )


def check_token_ids(data: TextData, num_embeddings: int, model_name: str) -> None:
    """Check that the model knows every token.

    Raises:
        DataError: the tokenizer gives larger token ids than the model has embeddings.
    """
    for ids in (data.train.ids, data.calibration, data.validation.ids, data.test.ids, data.other.ids):
        if ids.numel() and int(ids.max()) >= num_embeddings:
            raise DataError(
                f"{model_name} knows the tokens 0 to {num_embeddings - 1}; its tokenizer gives {int(ids.max())}; "
                "use the tokenizer that belongs to the model"
            )
