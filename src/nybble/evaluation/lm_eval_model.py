"""Side effects on lm-eval, all in this file: replaced functions of its evaluator, and a subclass of its model class.

disable_inquiries    lm-eval asks git for the commit of the working folder, and git prints an error outside a
                     repository. It asks pip and other programs about the machine, for more than a second.
wrap_model           lm-eval's HFLM with a computed batch size and one progress bar for whole documents.
                     A model on disk is read once for each task, and several processes divide the requests. Texts have
                     no end tokens: a tokenizer that ends every text would make lm-eval score the end token in place of
                     the answer's first one. The tokenizer itself stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from nybble import processes
from nybble.console import bar
from nybble.data.boundaries import added_tokens, num_equal
from nybble.errors import DataError, OptionError
from nybble.models.composite import text_config
from nybble.models.layers_on_disk import layers_on_disk
from nybble.models.streamed import BlockwiseForward

# Longest window in tokens of a whole document. Published word perplexities that nybble is compared with use windows of
# this length.
MAX_WINDOW = 2048
# Bytes that the logits of one forward may take, together with the copy that log_softmax makes.
_LOGIT_BYTES = 2 << 30
# Requests per forward. Larger batches are no faster.
_MAX_REQUESTS = 32
# log_softmax of lm-eval: the logits and a copy, in float32.
_BYTES_PER_LOGIT = 2 * 4


def disable_inquiries() -> None:
    """Keep lm-eval from asking other programs for a commit and for the machine; its results then have neither."""
    from lm_eval import evaluator

    evaluator.get_git_commit_hash = lambda: None
    evaluator.add_env_info = lambda storage: None


def max_window(config: Any) -> int:
    """Return the number of tokens in the longest window of a whole document, for a model with this config."""
    return min(MAX_WINDOW, getattr(text_config(config), "max_position_embeddings", None) or MAX_WINDOW)


def default_batch_size(config: Any, length: int) -> int:
    """Return how many requests of `length` tokens go into one forward; at least 1."""
    return int(max(1, min(_MAX_REQUESTS, _LOGIT_BYTES // (_BYTES_PER_LOGIT * length * text_config(config).vocab_size))))


class _WithoutEndTokens:
    """What changes in HFLM: no text ends with the tokens that the tokenizer puts after a text.

    Attributes:
        tokenizer: of HFLM.
        num_end_tokens: tokens that it puts after a text.
    """

    tokenizer: Any
    prefix_token_id: int
    num_end_tokens: int

    @property
    def eot_token_id(self) -> int:
        eos: int | None = self.tokenizer.eos_token_id
        return self.prefix_token_id if eos is None else eos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        if add_special_tokens is None:  # lm-eval adds none to a text that starts with the begin token
            begin = self.tokenizer.bos_token or self.tokenizer.eos_token
            add_special_tokens = not (begin and string.startswith(begin))
        ids: list[int] = super().tok_encode(string, add_special_tokens, **options)  # type: ignore[misc]
        return ids[: len(ids) - self.num_end_tokens] if add_special_tokens else ids

    def tok_batch_encode(self, strings: list[str], **options: Any) -> tuple[Tensor, Tensor]:
        ids, mask = super().tok_batch_encode(strings, **options)  # type: ignore[misc]  # padded on the left
        begin = self.tokenizer.bos_token
        length = ids.shape[1] - (0 if begin and strings[0].startswith(begin) else self.num_end_tokens)
        return ids[:, :length], mask[:, :length]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        prompt, answer = super()._encode_pair(context, continuation)  # type: ignore[misc]
        if answer:
            return prompt, answer
        # The tokenizer has joined the answer with the prompt's end.
        whole = self.tok_encode(context + continuation)
        shared = num_equal(whole, prompt)
        if shared == len(whole):
            raise DataError(
                f"every answer must have a token that its prompt predicts; {continuation!r} after {context[-40:]!r} "
                "has none; leave this task out, or correct its data"
            )
        return whole[:shared] or [self.prefix_token_id], whole[shared:]


class _BlockByBlock:
    """What changes in HFLM for a model on disk: log-likelihoods are computed twice.

    The first time only collects the inputs of all forwards, and every logit is 0. Then the inputs go through one block
    after the other, and the second time finds the outputs of the last one. So the model is read once for all requests
    of a task. Text that is generated reads it for every token.

    Attributes:
        model: of HFLM.
    """

    model: Any
    _collected: list[Tensor] | None = None
    _calls: Iterator[AbstractContextManager[None]] | None = None

    def loglikelihood(self, requests: Any, *arguments: Any, **options: Any) -> Any:
        return self._twice(super().loglikelihood, requests, *arguments, **options)  # type: ignore[misc]

    def loglikelihood_rolling(self, requests: Any, *arguments: Any, **options: Any) -> Any:
        return self._twice(super().loglikelihood_rolling, requests, *arguments, **options)  # type: ignore[misc]

    def _twice(self, compute: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if layers_on_disk(self.model) is None:
            return compute(*arguments, **options)
        batches: list[Tensor] = []
        self._collected = batches
        compute(*arguments, **options)
        self._collected = None
        forward = BlockwiseForward(self.model, dict(enumerate(batches)))
        self._calls = (forward.at(number) for number in range(len(batches)))
        results = compute(*arguments, **options)
        self._calls = None
        return results

    def _model_call(self, inps: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if self._collected is not None:
            self._collected.append(inps.cpu())
            return inps.new_zeros(1, dtype=torch.float32).expand(*inps.shape, text_config(self.model.config).vocab_size)
        with nullcontext() if self._calls is None else next(self._calls):
            logits: Tensor = super()._model_call(inps, *arguments, **options)  # type: ignore[misc]
        return logits


def wrap_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """Return lm-eval's model object for a transformers model or an exported one.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        batch_size: requests per forward; 0 = `default_batch_size` of the longest request of each task. lm-eval's own
            "auto" tries larger sizes until the memory is full.
    """
    from lm_eval.models.huggingface import HFLM

    window = max_window(model.config)
    longest_context = getattr(text_config(model.config), "max_position_embeddings", None) or MAX_WINDOW

    class SizedHFLM(_WithoutEndTokens, HFLM):  # type: ignore[misc]
        """HFLM with a computed batch size, and one progress bar for whole documents."""

        num_end_tokens = len(added_tokens(tokenizer).after)

        def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **options: Any) -> Any:
            longest = max((len(context) + len(answer) for _, context, answer in requests), default=1)
            self.batch_size_per_gpu = batch_size or default_batch_size(model.config, min(longest, longest_context))
            if "override_bs" in options:  # called by loglikelihood_rolling, which divides the documents and has a bar
                options["disable_tqdm"] = True
                return super()._loglikelihood_tokens(requests, *arguments, **options)
            own = [requests[i] for i in processes.share(len(requests))]
            scores = super()._loglikelihood_tokens(own, *arguments, **options) if own else []
            return processes.merge(scores, len(requests))

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            """Generate texts.

            Raises:
                OptionError: a task generates more tokens than the model has positions.
            """
            most = max((int(request.args[1].get("max_gen_toks") or 0) for request in requests), default=0)
            if most >= longest_context:
                raise OptionError(
                    f"--eval_tasks must generate fewer tokens than the {longest_context} positions of the model; "
                    f"{requests[0].task_name} generates up to {most}; leave it out"
                )
            own = [requests[i] for i in processes.share(len(requests))]
            texts = super().generate_until(own, disable_tqdm) if own else []
            return processes.merge(texts, len(requests))

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """Score whole documents, one at a time. lm-eval itself draws a bar for every forward."""
            scores: list[float] = []
            self._max_length = window  # of all other requests it is the context of the model
            with bar(f"{requests[0].task_name}, documents", len(requests)) as advance:
                for i in processes.share(len(requests)):
                    scores += super().loglikelihood_rolling([requests[i]], disable_tqdm=True)
                    advance(min(processes.count(), len(requests) - i))
            self._max_length = longest_context
            return processes.merge(scores, len(requests))

    class AnyHFLM(_BlockByBlock, SizedHFLM):
        """The same, also of a model on disk."""

    initial = batch_size or default_batch_size(model.config, window)
    return AnyHFLM(pretrained=model, tokenizer=_with_padding(tokenizer), batch_size=initial, max_length=longest_context)


def _with_padding(tokenizer: Any) -> Any:
    """The tokenizer, or a copy of it with a padding token: lm-eval would set one in the tokenizer that is shipped."""
    if tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token or tokenizer.bos_token
    return tokenizer
