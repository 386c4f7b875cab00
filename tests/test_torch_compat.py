"""Both sides agree, and the comparison that says so can fail."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import modeling_attn_mask_utils as transformers_masks

import jaxmask
from jaxmask.hf import modeling_attn_mask_utils as jax_masks
from torch_compat import minilm, verify
from torch_compat.bridge import to_jax, to_torch
from torch_compat.cases import DTYPES, OPERATIONS, generate, text_masks

JAX_DTYPES = [jnp.bool_, jnp.int32, jnp.int64, jnp.float32, jnp.float16, jnp.bfloat16, jnp.float64]
HF_NAMES = {
    "to_causal_4d": "AttentionMaskConverter.to_causal_4d",
    "to_4d": "AttentionMaskConverter.to_4d",
    "make_causal_mask": "AttentionMaskConverter._make_causal_mask",
    "expand_mask": "AttentionMaskConverter._expand_mask",
    "unmask_unattended": "AttentionMaskConverter._unmask_unattended",
    "ignore_causal_mask_sdpa": "AttentionMaskConverter._ignore_causal_mask_sdpa",
    "create_4d_causal_attention_mask": "_create_4d_causal_attention_mask",
    "prepare_4d_causal_attention_mask": "_prepare_4d_causal_attention_mask",
    "prepare_4d_causal_attention_mask_for_sdpa": "_prepare_4d_causal_attention_mask_for_sdpa",
    "prepare_4d_attention_mask": "_prepare_4d_attention_mask",
    "prepare_4d_attention_mask_for_sdpa": "_prepare_4d_attention_mask_for_sdpa",
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_has_the_bits_of_both_oracles(operation: str, dtype: str) -> None:
    for row in verify.compare_operation(operation, dtype, list(verify.ORACLES), cases=40, seed=7):
        assert row.first_difference is None
        assert row.cases >= 30


@pytest.mark.parametrize("operation", OPERATIONS)
def test_cases_of_an_operation_are_mostly_answered(operation: str) -> None:
    """Errors that agree are few: a comparison of errors alone would show nothing."""
    with verify._precision("float32"):
        results = [verify.call_jax(case) for case in generate(operation, "float32", 60, seed=1)]
    assert sum(isinstance(result, Exception) for result in results) < 20


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_injected_fault_fails_and_is_named(operation: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    *owner, name = HF_NAMES[operation].split(".")
    target = getattr(jax_masks, owner[0]) if owner else jax_masks
    original = getattr(target, name)

    def faulty(*args: object, **kwargs: object) -> object:
        result = original(*args, **kwargs)
        return _flip_last_sign(result) if isinstance(result, jax.Array) else not result

    is_static = bool(owner) and isinstance(target.__dict__[name], staticmethod)
    monkeypatch.setattr(target, name, staticmethod(faulty) if is_static else faulty)
    console = Console(record=True, width=100)
    report = tmp_path / "report.json"
    beside = next(name for name in OPERATIONS if name != operation)
    status = verify.run(
        cases=15,
        operations=[beside, operation],
        dtypes=["float32"],
        oracles=["reference"],
        report=report,
        console=console,
    )
    assert status == 1
    wrong = [row["operation"] for row in json.loads(report.read_text())["rows"] if row["equal"] < row["cases"]]
    assert wrong == [operation]
    assert f"{operation}, float32, against reference" in console.export_text()


def _flip_last_sign(array: jax.Array) -> jax.Array:
    """The smallest of faults: one zero of the other sign, or one element of another value."""
    last = (-1,) * array.ndim
    if array.dtype == jnp.bool_ or jnp.issubdtype(array.dtype, jnp.integer):
        return array.at[last].set(array[last] == 0)
    return array.at[last].set(-array[last])


def test_run_without_difference_ends_with_status_0_and_a_report(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    console = Console(record=True, width=100)
    assert verify.run(cases=3, operations=["expand_mask"], dtypes=["bfloat16"], report=report, console=console) == 0
    content = json.loads(report.read_text())
    assert content["comparisons"] == 6
    assert {row["oracle"] for row in content["rows"]} == {"reference", "transformers"}
    assert "6 comparisons, bit for bit: 0 differences" in console.export_text()


@pytest.mark.parametrize("arguments", [{"operations": ["to_5d"]}, {"dtypes": ["int8"]}, {"oracles": ["me"]}])
def test_unknown_names_are_refused_with_the_known_ones(arguments: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match=r"'\w+' is not one of \w+, "):
        verify.run(**arguments)  # pyright: ignore[reportArgumentType]


def test_compare_sees_the_sign_of_zero() -> None:
    assert verify.compare(jnp.zeros(2), torch.tensor([0.0, -0.0])) is not None
    assert verify.compare(jnp.zeros(2), torch.zeros(2)) is None


def test_compare_sees_shape_and_dtype() -> None:
    assert verify.compare(jnp.zeros((1, 2)), torch.zeros(2)) is not None
    assert verify.compare(jnp.zeros(2, jnp.float16), torch.zeros(2)) is not None


def test_compare_tells_none_from_a_mask_and_true_from_false() -> None:
    assert verify.compare(None, torch.zeros(1)) is not None
    assert verify.compare(None, None) is None
    assert verify.compare(True, False) is not None


def test_compare_takes_errors_of_one_kind_as_equal() -> None:
    assert verify.compare(ValueError("a"), RuntimeError("b")) is None
    assert verify.compare(NotImplementedError("a"), ValueError("b")) is not None
    assert verify.compare(ValueError("a"), None) is not None


def test_compare_never_takes_a_type_error_as_agreement() -> None:
    assert verify.compare(TypeError("a"), TypeError("b")) is not None


@pytest.mark.parametrize("dtype", JAX_DTYPES)
def test_bridge_to_torch_shares_memory(dtype: jnp.dtype) -> None:
    with jax.enable_x64(True):
        array = jnp.arange(6).reshape(2, 3).astype(dtype)
        tensor = to_torch(array)
        assert tensor.data_ptr() == array.unsafe_buffer_pointer()
        assert str(tensor.dtype) == f"torch.{array.dtype}"


@pytest.mark.parametrize("dtype", JAX_DTYPES)
def test_bridge_round_trip_keeps_every_bit(dtype: jnp.dtype) -> None:
    with jax.enable_x64(True):
        array = (jnp.arange(6).reshape(2, 3) - 2).astype(dtype) * (-1 if jnp.issubdtype(dtype, jnp.floating) else 1)
        back = to_jax(to_torch(array))
        assert back.dtype == array.dtype
        assert np.asarray(back).tobytes() == np.asarray(array).tobytes()


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
def test_bridge_to_jax_takes_views_and_strides(rows: int, columns: int, start: int) -> None:
    tensor = torch.arange(200, dtype=torch.float32).reshape(10, 20)[start : start + rows, start::2][:, :columns].T
    assert np.array_equal(np.asarray(to_jax(tensor)), tensor.numpy())


def test_bridge_refuses_what_it_would_have_to_change() -> None:
    with pytest.raises(ValueError, match=r"tensor is torch\.int64.*torch\.int32.*jax_enable_x64"):
        to_jax(torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"requires grad.*detach"):
        to_jax(torch.ones(2, requires_grad=True))
    with pytest.raises(TypeError, match="tensor must be a PyTorch tensor, got a ndarray"):
        to_jax(np.ones(2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="array is traced"):
        jax.jit(to_torch)(jnp.ones(2))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_real_model_has_the_same_hidden_states_under_our_mask(attention: str) -> None:
    result = minilm.check(attention)  # pyright: ignore[reportArgumentType]
    assert result.layers == 7
    assert result.identical_layers == result.layers
    assert result.mask_matters


def test_real_texts_are_padded_on_both_sides() -> None:
    masks = list(text_masks())
    assert any((mask[:, 0] == 0).any() for mask in masks)
    assert any((mask[:, -1] == 0).any() for mask in masks)


@pytest.mark.parametrize("query_length", [1, 4])
@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("sliding_window", [None, 2, 50])
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_skip_decision_while_tracing_is_the_originals(
    query_length: int, past: int, sliding_window: int | None, is_training: bool, with_mask: bool
) -> None:
    answers: list[bool] = []

    def traced(embeds: jax.Array, mask: jax.Array | None) -> jax.Array:
        answers.append(jaxmask.ignore_causal_mask_sdpa(mask, embeds, past, sliding_window, is_training))
        return embeds

    mask = jnp.ones((2, query_length + past), jnp.int32) if with_mask else None
    jax.eval_shape(traced, jnp.zeros((2, query_length, 8)), mask)
    with FakeTensorMode(), verify._precision("float32"):
        theirs = transformers_masks.AttentionMaskConverter._ignore_causal_mask_sdpa(
            torch.ones(2, query_length + past) if with_mask else None,
            torch.zeros(2, query_length, 8),
            past,
            sliding_window,
            is_training,
        )
    assert answers == [theirs]


def test_a_traced_mask_of_ones_is_still_written_out() -> None:
    embeds = jnp.zeros((1, 3, 8))
    assert jaxmask.prepare_4d_attention_mask_for_sdpa(jnp.ones((1, 3))) is None
    shape = jax.eval_shape(jaxmask.prepare_4d_attention_mask_for_sdpa, jnp.ones((1, 3)))
    assert shape is not None
    assert shape.shape == (1, 1, 3, 3)
    traced = jax.eval_shape(
        lambda m: jaxmask.prepare_4d_causal_attention_mask_for_sdpa(m, (1, 3), embeds, 0), jnp.ones((1, 3))
    )
    assert traced is not None
    assert traced.shape == (1, 1, 3, 3)
