"""Questions to token ids and padded batches.

A causal model's prediction at position t is of token t + 1. A loss mask marks positions by the prediction made there,
so the mask of an answer starts one position before the answer's first token.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.data import packing
from nybble.data.boundaries import AddedTokens, added_tokens, encode_pair
from nybble.errors import DataError
from nybble.models.head import LMHead, last_hidden_states
from nybble.tasks.dataset import Question
from nybble.training.losses import cross_entropy, kl_to_teacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("nybble")


class EncodedAnswer(NamedTuple):
    """Token ids of a prompt and an answer.

    Attributes:
        ids: tokens of the prompt, then of the answer.
        prompt_length: number of tokens that belong to the prompt.
    """

    ids: list[int]
    prompt_length: int

    @property
    def first_target(self) -> int:
        """Index of the first token to be predicted.

        It is the answer's first token, or its second where there is no prompt from which the first could be predicted.
        """
        return max(self.prompt_length, 1)

    @property
    def num_targets(self) -> int:
        """Number of answer tokens to be predicted."""
        return max(0, len(self.ids) - self.first_target)


def encode_answer(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> EncodedAnswer:
    """Tokenize prompt and answer as one text, without the tokens that the tokenizer puts after a text.

    Spaces at the prompt's end are moved to the answer, as lm-eval does.

    Raises:
        DataError: no token of the text can be predicted and is the answer's.
    """
    return _encode(tokenizer, prompt, answer, added_tokens(tokenizer))


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, added: AddedTokens) -> EncodedAnswer:
    context = prompt.rstrip()
    text = EncodedAnswer(*encode_pair(tokenizer, context, prompt[len(context) :] + answer, added))
    if not text.num_targets:
        raise DataError(
            f"every answer must have a token that its prompt predicts; {answer!r} after {prompt[-40:]!r} has none; "
            "correct this row of the task"
        )
    return text


def encode_right_answers(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], seq_len: int
) -> list[EncodedAnswer]:
    """Encode prompt and right answer of each question, for training on answer tokens.

    Texts are truncated to `seq_len` tokens. Texts without an answer token within `seq_len` are left out. A completion
    (a question without alternatives) is followed by the end-of-text token. Truncated and omitted answers are counted
    in a warning.

    Raises:
        DataError: an answer has no tokens, or no text is left.
    """
    end, added = packing.end_tokens(tokenizer), added_tokens(tokenizer)
    encoded = []
    for question in questions:
        text = _encode(tokenizer, question.prompts[question.label], question.choices[question.label], added)
        ids = text.ids if question.has_alternatives else text.ids + end
        encoded.append(EncodedAnswer(ids, text.prompt_length))
    num_cut = sum(text.first_target < seq_len < len(text.ids) for text in encoded)
    encoded = [EncodedAnswer(text.ids[:seq_len], text.prompt_length) for text in encoded]
    texts = [text for text in encoded if text.num_targets]
    if not texts:
        shortest = min((text.prompt_length for text in encoded), default=0)
        raise DataError(
            f"answers must have tokens within --seq_len {seq_len}; none of {len(encoded)} has; "
            f"the shortest prompt has {shortest} tokens; use a larger --seq_len"
        )
    if len(texts) < len(encoded):
        log.warning(
            "left out %d of %d rows, which have no answer within %d tokens (--seq_len)",
            len(encoded) - len(texts),
            len(encoded),
            seq_len,
        )
    if num_cut:
        log.warning("truncated %d of %d answers at token %d (--seq_len)", num_cut, len(encoded), seq_len)
    return texts


def encode_choices(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], seq_len: int, kind: str = ""
) -> list[list[EncodedAnswer]]:
    """Encode prompt and answer of every choice of each question.

    Texts that are longer than `seq_len` tokens lose the beginning of their prompt.

    Args:
        tokenizer: of the model.
        questions: the rows.
        seq_len: tokens of the longest text.
        kind: which rows they are, for a warning of texts that lose something; "" for no warning.

    Raises:
        DataError: an answer has no tokens.
    """
    added, num_cut = added_tokens(tokenizer), 0
    encoded = []
    for question in questions:
        texts = [_encode(tokenizer, *pair, added) for pair in zip(question.prompts, question.choices, strict=True)]
        # Where one choice shares a token with the prompt, all of them are scored from this token on.
        starts: dict[str, int] = {}
        for prompt, text in zip(question.prompts, texts, strict=True):
            starts[prompt] = min(text.prompt_length, starts.get(prompt, text.prompt_length))
        num_cut += any(len(text.ids) > seq_len for text in texts)
        encoded.append(
            [
                _keep_end(EncodedAnswer(text.ids, starts[prompt]), seq_len)
                for prompt, text in zip(question.prompts, texts, strict=True)
            ]
        )
    if num_cut and kind:
        log.warning(
            "the prompts of %d of %d %s rows lose their beginning, to fit into %d tokens (--seq_len)",
            num_cut, len(questions), kind, seq_len,
        )  # fmt: skip
    return encoded


def _keep_end(text: EncodedAnswer, seq_len: int) -> EncodedAnswer:
    excess = max(0, len(text.ids) - seq_len)
    return EncodedAnswer(text.ids[excess:], max(text.prompt_length - excess, 0))


def shared_prefix_length(texts: Sequence[EncodedAnswer]) -> int:
    """Number of tokens with which all choices of a question begin, and which need to go through the model only once.

    It excludes the last prompt token of every choice: the prediction of an answer's first token is made there. It is
    0 for a single choice.
    """
    if len(texts) == 1:
        return 0
    columns = list(zip(*(text.ids for text in texts), strict=False))
    num_equal = next((t for t, column in enumerate(columns) if len(set(column)) > 1), len(columns))
    return max(0, min(num_equal, min(text.prompt_length for text in texts) - 1))


def num_forward_tokens(texts: Sequence[EncodedAnswer]) -> int:
    """Number of tokens that go through the model for all choices of a question.

    These are the tokens of the shared prefix, once, and of the rest of each choice, padded to the longest rest.
    """
    shared = shared_prefix_length(texts)
    return shared + len(texts) * (max(len(text.ids) for text in texts) - shared)


@dataclass(frozen=True)
class PaddedBatch:
    """Texts padded at their ends. A causal model's predictions for the real tokens do not depend on this padding.

    Attributes:
        ids: token ids, int64 [B, T].
        loss_mask: bool [B, T]; True where the prediction that is made at a position counts.
    """

    ids: Tensor
    loss_mask: Tensor

    def token_losses(self, model: Any, head: LMHead | None) -> Tensor:
        """-log p of each predicted token, in nats: float32 [N].

        The tokens are in row-major order of the N True entries of the loss mask.

        Args:
            model: transformers model, or an exported model with the same call.
            head: head of the model; None = use the model's own logits, as for exported models.
        """
        if head is None:
            logits_BTV = model(input_ids=self.ids).logits.float()
            return F.cross_entropy(logits_BTV[self.loss_mask], self.ids.roll(-1, 1)[self.loss_mask], reduction="none")
        device = model.device
        loss_mask, targets_BT = self.loss_mask.to(device), self.ids.roll(-1, 1).to(device)
        hidden_BTD = last_hidden_states(model, self.ids.to(device))
        return cross_entropy(hidden_BTD[loss_mask], targets_BT[loss_mask], head)

    def kl_to_teacher(self, model: Any, head: LMHead, teacher: Any, teacher_head: LMHead) -> Tensor:
        """Mean of KL(teacher || model) over the predicted tokens, in nats: float32 scalar.

        Args:
            model: transformers model; the result is differentiable in its parameters.
            head: its head.
            teacher: transformers model with the same vocabulary.
            teacher_head: its head.
        """
        ids, loss_mask = self.ids.to(model.device), self.loss_mask.to(model.device)
        with torch.no_grad():
            teacher_ND = last_hidden_states(teacher, ids)[loss_mask]
        return kl_to_teacher(last_hidden_states(model, ids)[loss_mask], teacher_ND, head, teacher_head)

    def sum_by_text(self, losses_N: Tensor) -> Tensor:
        """Sum of the token losses of each text: float32 [B].

        Args:
            losses_N: result of `token_losses`.
        """
        text_N = self.loss_mask.nonzero()[:, 0].to(losses_N.device)
        return torch.zeros(len(self.ids), device=losses_N.device).index_add_(0, text_N, losses_N)


def pad_batch(texts: Sequence[EncodedAnswer], include_prompt: bool = False) -> PaddedBatch:
    """Pad texts to the length of the longest.

    Args:
        include_prompt: whether the loss mask covers the tokens of the prompts too.
    """
    length = max(len(text.ids) for text in texts)
    ids = torch.zeros(len(texts), length, dtype=torch.int64)
    loss_mask = torch.zeros(len(texts), length, dtype=torch.bool)
    for i, text in enumerate(texts):
        ids[i, : len(text.ids)] = torch.tensor(text.ids)
        first = 0 if include_prompt else text.first_target - 1
        loss_mask[i, first : len(text.ids) - 1] = True
    return PaddedBatch(ids, loss_mask)
