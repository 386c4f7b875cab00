"""Attention of ours is that of Transformers' models, and the comparison that says so finds a wrong mask."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from jaxmask import Causal, Full, Mask, SlidingWindow, Window
from torch_compat.verify import attention, model_attention


@pytest.mark.parametrize("name", model_attention.MASKS)
def test_attention_of_ours_is_that_of_every_layer_of_a_model(name: str) -> None:
    result = model_attention.check(name)
    calls, *differences = result.measures
    # Of two layers, by each implementation, in each part.
    assert calls.value == {"gpt-oss": 4, "ModernBERT": 4}.get(name, 8)
    assert len(differences) == (4 if name == "gpt-oss" else 3)
    assert result.agrees


WRONG: dict[str, tuple[str, Callable[[Any], list[Mask]]]] = {
    # What the configuration calls local attention is the width of both sides.
    "the whole width on each side": (
        "ModernBERT",
        lambda config: [Window(config.local_attention, config.local_attention), Full()],
    ),
    # The layers of ModernBERT hold one more than their configuration, for FlashAttention.
    "one key more on each side": (
        "ModernBERT",
        lambda config: [Window(config.sliding_window + 1, config.sliding_window + 1), Full()],
    ),
    "a window that looks back alone": ("ModernBERT", lambda config: [Window(config.sliding_window, 0), Full()]),
    "a window that does not count its own key": (
        "gpt-oss",
        lambda config: [SlidingWindow(config.sliding_window + 1), Causal()],
    ),
    "the layers in another order": ("gpt-oss", lambda config: [Causal(), SlidingWindow(config.sliding_window)]),
    "no window": ("Qwen3", lambda config: [Causal(), Causal()]),
    "a layer that sees what follows": ("OLMo-2", lambda config: [Causal(), Full()]),
}


@pytest.mark.parametrize(("name", "masks"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_mask_of_a_layer_fails(
    name: str, masks: Callable[[Any], list[Mask]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(model_attention.MASKS, name, masks)
    calls, in_xla, in_blocks, *without = model_attention.check(name).measures
    assert not in_xla.is_within
    assert not in_blocks.is_within
    assert all(measure.is_within for measure in (calls, *without))


@pytest.mark.parametrize("operation", ["attention_xla", "attention_blocked"])
def test_a_fault_in_attention_fails_and_is_named(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = attention.IMPLEMENTATIONS[operation]

    def faulty(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) * 1.00001

    monkeypatch.setitem(attention.IMPLEMENTATIONS, operation, faulty)
    result = model_attention.check("OLMo-2")
    assert not result.agrees
    assert f"difference of {operation} 1.0" in result.describe()
    assert "NOT at most 2e-06" in result.describe()


def test_the_models_keep_their_own_attention() -> None:
    before = dict(ALL_ATTENTION_FUNCTIONS)
    model_attention.check("OLMo-2")
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
