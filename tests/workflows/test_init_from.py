"""--init_from: what the run that is taken over must be, and what is said where it is not."""

from pathlib import Path
from typing import Any

import pytest

from nybble.errors import ModelError, OptionError
from nybble.workflows import init_from
from nybble.workflows.compress import compress
from nybble.workflows.distill import distill
from tests.helpers.compress import compress_options
from tests.helpers.distill import distill_options
from tests.helpers.tiny import save_model


def start(folder: Path, **changes: Any) -> Path:
    """A model in folder/model, and a run that compressed it."""
    model = save_model(folder / "model", "smollm")
    return compress(compress_options(model, folder / "start", method="rtn", **changes))


def test_what_nybble_made_is_no_16_bit_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = start(tmp_path, export=("openvino", "hf"))
    for folder in (run, run / "quantized", run / "openvino"):
        with pytest.raises(ModelError, match="must be a 16-bit model; it is a 4-bit model that nybble made; name the"):
            init_from.check_sixteen_bit(str(folder))
    caplog.clear()
    init_from.check_sixteen_bit(str(run / "hf"))
    assert "is an export of nybble: its weights were rounded to 4 bits before" in caplog.text
    caplog.clear()
    init_from.check_sixteen_bit(str(tmp_path / "model"))
    assert not caplog.text


def test_the_flag_of_another_scheme_is_named(tmp_path: Path) -> None:
    run = start(tmp_path, group_size=16)
    with pytest.raises(OptionError, match="add --bits 4 --group_size 16$"):
        distill(distill_options(tmp_path / "model", tmp_path / "run", init_from=str(run)))


def test_of_a_run_with_several_schemes_its_options_are_named(tmp_path: Path) -> None:
    run = start(tmp_path, layer=("*.down_proj:bits=8",))
    with pytest.raises(OptionError, match=f"give --bits, --layer and the other options .* as {run}/config.toml has"):
        distill(distill_options(tmp_path / "model", tmp_path / "run", init_from=str(run), group_size=32))


def test_other_weights_of_the_same_name_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, group = start(tmp_path), {"group_size": 32}
    other = save_model(tmp_path / "other" / "model", "smollm", seed=1)
    words = f"--init_from {run} was made of another model, with other weights"
    distill(distill_options(tmp_path / "model", tmp_path / "one", init_from=str(run), epochs=1, **group))
    assert words not in caplog.text
    distill(distill_options(other, tmp_path / "two", init_from=str(run), epochs=1, **group))
    assert words in caplog.text
