"""CheckpointShards: the safetensors files of a checkpoint, read decoder block by decoder block.

transformers loads a whole checkpoint: it renames tensors, stacks and splits them, and converts their dtypes. Here its
own function does the same to the tensors of one block at a time, so that a block that is read alone has the bits that
it has in the loaded model.

Refused (ModelError): weights that are not in safetensors files, which cannot be read in part.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nybble.errors import ModelError, first_line
from nybble.models.composite import decoder_path, is_inside
from nybble.models.linearize import linearize

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def safetensors_files(pretrained: str) -> list[Path]:
    """Return the safetensors files of a model folder or of a model of the hub, which is downloaded if it has to be.

    Raises:
        ModelError: the weights are in files of another kind.
    """
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    found: dict[str, Any] = {
        name: cached_file(pretrained, name, _raise_exceptions_for_missing_entries=False) for name in (_WHOLE, _INDEX)
    }
    if found[_WHOLE] is not None:
        return [Path(found[_WHOLE])]
    if found[_INDEX] is None:
        raise ModelError(
            f"--offload disk needs weights in safetensors files, which are read block by block; {pretrained} has none; "
            "convert it, or use --offload none"
        )
    files, _ = get_checkpoint_shard_files(pretrained, found[_INDEX])
    return [Path(file) for file in files]


def find_blocks(model: nn.Module) -> str | None:
    """Return the path of the list of decoder blocks: of the module lists in the text decoder the one that holds most
    parameters. None if there is no such list.

    Args:
        model: transformers.PreTrainedModel, also on the meta device.
    """
    decoder = decoder_path(model)
    sizes = {
        path: sum(parameter.numel() for parameter in module.parameters())
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and is_inside(path, decoder)
    }
    return max(sizes, key=lambda path: (sizes[path], -len(path)), default=None)


class CheckpointShards:
    """The tensors of a checkpoint, grouped by decoder block.

    Args:
        files: safetensors files.
        skeleton: the transformers model on the meta device, not linearized. It stays there.
        path: of its list of decoder blocks.
        dtype: of all parameters.
        device: where tensors are read to.
    """

    def __init__(
        self, files: Sequence[Path], skeleton: Any, path: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._skeleton, self._path, self._dtype, self._device = skeleton, path, dtype, device
        self._files: dict[str, Path] = {}
        for file in files:
            with safe_open(file, "pt") as opened:
                self._files |= dict.fromkeys(opened.keys(), file)
        count = len(skeleton.get_submodule(path))
        self._rest: list[str] = []
        self._blocks: list[list[str]] = [[] for _ in range(count)]
        for key, target in self._targets().items():
            number = target.removeprefix(f"{path}.").partition(".")[0]
            is_in_block = target.startswith(f"{path}.") and number.isdigit() and int(number) < count
            (self._blocks[int(number)] if is_in_block else self._rest).append(key)

    def compare(self) -> tuple[set[str], set[str]]:
        """Compare the headers of the files with the model, without reading a tensor.

        Returns:
            Names of the parameters that are not in the files, and tensors in the files that have no place.

        Raises:
            RuntimeError: a tensor has another shape than its parameter.
        """
        with self._opened(list(self._files)) as slices:
            empty = {
                key: torch.empty(part.get_shape(), dtype=self._header_dtype(part.get_dtype()), device="meta")
                for key, part in slices.items()
            }
        info = self._load(self._skeleton, empty, torch.device("meta"))
        self._skeleton.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        self._skeleton._adjust_missing_and_unexpected_keys(info)
        return info.missing_keys, info.unexpected_keys

    def load_rest(self, model: Any) -> None:
        """Load all parameters outside of the blocks into a model, in place, and tie them as transformers does.

        Args:
            model: as the skeleton.
        """
        with self._opened(self._rest) as slices:
            missing = self._load(model, slices, self._device).missing_keys
        in_blocks = {key for key in missing if key.startswith(f"{self._path}.")}
        model.tie_weights(missing_keys=missing - in_blocks, recompute_mapping=False)

    def read_block(self, i: int) -> dict[str, Tensor]:
        """Read block i.

        Returns:
            Name within the linearized block -> parameter or buffer.

        Raises:
            ModelError: the files cannot be read any more.
        """
        skeleton, name = self._skeleton, f"{self._path}.{i}"
        empty = skeleton.get_submodule(name)
        skeleton.set_submodule(name, copy.deepcopy(empty))
        try:
            with self._opened(self._blocks[i]) as slices:
                self._load(skeleton, slices, self._device)
            state: dict[str, Tensor] = linearize(skeleton.get_submodule(name)).state_dict()
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            folder = next(iter(self._files.values())).parent
            raise ModelError(
                f"{folder} must stay as it is while a run reads decoder blocks from it; block {i} cannot be read "
                f"({first_line(error)}); bring the files back, then add --resume"
            ) from error
        finally:
            skeleton.set_submodule(name, empty)
        return state

    def _targets(self) -> dict[str, str]:
        """Tensor in the files -> the parameter of the model that it becomes, or is a part of."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping, state = get_model_conversion_mapping(self._skeleton), self._skeleton.state_dict()
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        prefix = self._skeleton.base_model_prefix
        found = {key: rename_source_key(key, renamings, converters, prefix, state)[0] for key in self._files}
        for key, target in found.items():
            if target not in state and key in state:  # as transformers does it
                found[key] = rename_source_key(key, [], [], prefix, state)[0]
        return found

    def _load(self, model: Any, tensors: dict[str, Any], device: torch.device) -> Any:
        """Load tensors of the files into a model with all conversions of transformers; returns its LoadStateDictInfo.

        Raises:
            RuntimeError: a tensor has another shape than its parameter, or cannot be converted.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        mapping: Any = get_model_conversion_mapping(model)
        config = LoadStateDictConfig(
            # With a place on disk, which nothing has, tensors are read one after the other and not by threads at once.
            device_map={"": device, "nothing": "disk"},
            dtype=self._dtype,
            dtype_plan=model._get_dtype_plan(self._dtype),
            weight_mapping=mapping,
        )
        info, _ = convert_and_load_state_dict_in_model(model, tensors, config)
        wrong = [*(str(entry[0]) for entry in info.mismatched_keys), *info.conversion_errors, *info.error_msgs]
        if wrong:
            raise RuntimeError(f"{len(wrong)} tensors do not fit the model (first: {min(wrong)})")
        return info

    def _header_dtype(self, name: str) -> torch.dtype:
        """A dtype of the kind that a header names: of floating-point numbers or of integers."""
        return self._dtype if name.startswith(("F", "BF")) else torch.int64

    @contextmanager
    def _opened(self, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Tensors that are read when they are used. The files are read, not mapped: a mapped file counts as memory."""
        with ExitStack() as stack:
            files = {
                file: stack.enter_context(safe_open(file, "pt", backend="pread"))
                for file in dict.fromkeys(self._files[key] for key in keys)
            }
            yield {key: files[self._files[key]].get_slice(key) for key in keys}
