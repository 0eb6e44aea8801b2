"""Facts about families, compared with the models of transformers, and a family that is registered from outside."""

from collections.abc import Iterator

import pytest
import torch
from transformers import CohereConfig, GraniteConfig, LlamaConfig

from nybble.models.families import DEFAULT, FAMILIES, ModelFamily, family_of, logit_transform
from nybble.models.head import LMHead
from tests.helpers.tiny import make_config, make_model


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(), (1.0, None)),
        (GraniteConfig(logits_scaling=8.0), (0.125, None)),
        (CohereConfig(logit_scale=0.25), (0.25, None)),
        (make_config("gemma2"), (1.0, 5.0)),
    ],
)
def test_logit_transform(config: object, expected: tuple[float, float | None]) -> None:
    assert logit_transform(config) == expected


def test_an_unregistered_model_type_gets_the_default() -> None:
    config = make_config("llama")
    config.model_type = "no_such_family"
    assert family_of(config) is DEFAULT
    assert ModelFamily(None, None, None) == DEFAULT


@pytest.fixture
def toy_family() -> Iterator[str]:
    """A family as another package would add it: Llama, but with logits divided by a field of the configuration."""
    FAMILIES.register("toy_llama", ModelFamily(logit_divisor="toy_divisor"))
    yield "toy_llama"
    FAMILIES.unregister("toy_llama")


def test_a_family_can_be_registered_from_outside(toy_family: str) -> None:
    model = make_model("llama")
    model.config.model_type, model.config.toy_divisor = toy_family, 4.0
    ids = torch.arange(8).view(1, 8)
    plain = model(input_ids=ids).logits
    head = LMHead.of(model)
    hidden = model.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(head.logits(hidden), plain / 4.0)
