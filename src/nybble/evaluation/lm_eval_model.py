"""Side effects on lm-eval, all in this file: a replaced function of its evaluator, and a subclass of its model class.

disable_git_lookup   lm-eval asks git for the commit of the working folder, and git prints an error outside a
repository. wrap_model           lm-eval's HFLM with a computed batch size and one progress bar for whole documents.
"""

from __future__ import annotations

from typing import Any

from nybble.console import bar

# Longest window in tokens. Published word perplexities that nybble is compared with use windows of this length.
MAX_WINDOW = 2048
# Bytes that the logits of one forward may take, together with the copy that log_softmax makes.
_LOGIT_BYTES = 2 << 30
# Requests per forward. Larger batches are no faster.
_MAX_REQUESTS = 32
# log_softmax of lm-eval: the logits and a copy, in float32.
_BYTES_PER_LOGIT = 2 * 4


def disable_git_lookup() -> None:
    """Keep lm-eval from asking git for a commit; its results then say that there is none."""
    from lm_eval import evaluator

    evaluator.get_git_commit_hash = lambda: None


def max_window(config: Any) -> int:
    """Return the number of tokens in the longest window that lm-eval gives to a model with this configuration."""
    return min(MAX_WINDOW, getattr(config, "max_position_embeddings", None) or MAX_WINDOW)


def default_batch_size(config: Any, length: int) -> int:
    """Return how many requests of `length` tokens go into one forward; at least 1."""
    return int(max(1, min(_MAX_REQUESTS, _LOGIT_BYTES // (_BYTES_PER_LOGIT * length * config.vocab_size))))


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

    class SizedHFLM(HFLM):  # type: ignore[misc]
        """HFLM with a computed batch size, and one progress bar for whole documents."""

        def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **options: Any) -> Any:
            longest = max((len(context) + len(answer) for _, context, answer in requests), default=1)
            self.batch_size_per_gpu = batch_size or default_batch_size(model.config, min(longest, window))
            if "override_bs" in options:  # called by loglikelihood_rolling, which has a bar of its own
                options["disable_tqdm"] = True
            return super()._loglikelihood_tokens(requests, *arguments, **options)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """Score whole documents, one at a time. lm-eval itself draws a bar for every forward."""
            scores: list[float] = []
            with bar(f"{requests[0].task_name}, documents", len(requests)) as advance:
                for request in requests:
                    scores += super().loglikelihood_rolling([request], disable_tqdm=True)
                    advance(1)
            return scores

    initial = batch_size or default_batch_size(model.config, window)
    return SizedHFLM(pretrained=model, tokenizer=tokenizer, batch_size=initial, max_length=window)
