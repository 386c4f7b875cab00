"""Files of a checkpoint that are broken on purpose: refused soon, by an error that names the file and what is in it."""

import json
import re
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.helpers.audit import watched
from tests.helpers.bad import bad, refusal, refusals
from tests.helpers.tiny import tiny_llama
from tests.torch_compat.test_models import write_gguf
from torch_compat import models

LLAMA = tiny_llama(num_hidden_layers=1)
CONFIG = json.loads(LLAMA.config.to_json_string())
WEIGHTS: dict[str, torch.Tensor] = {name: tensor.clone() for name, tensor in LLAMA.state_dict().items()}
STEERING = "\x1b]0;owned\x07\x1b[2J\n"


def load(
    config: dict[str, Any] | str = CONFIG, weights: dict[str, torch.Tensor] = WEIGHTS, index: str | None = None
) -> Any:
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        if index is not None:
            (folder / "model.safetensors.index.json").write_text(index)
        else:
            save_file(weights, folder / "model.safetensors")
        return read(folder)


def read(folder: Path, **how: Any) -> Any:
    """Load a folder, and do nothing meanwhile that must not be done."""
    with watched(folder) as done:
        try:
            return models.load(folder, **how)
        finally:
            assert done == []


def of_config(**changed: Any) -> Callable[[], Any]:
    return lambda: load(CONFIG | changed)


def of_index(index: Any) -> Callable[[], Any]:
    return lambda: load(index=json.dumps(index))


def load_gguf(content: bytes) -> Any:
    with TemporaryDirectory() as name:
        (Path(name) / "a.gguf").write_bytes(content)
        return read(Path(name), gguf_file="a.gguf")


def of_folder(change: Callable[[Path], object]) -> Callable[[], Any]:
    """To load a good folder of two files after a change."""

    def call() -> Any:
        with TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps(CONFIG))
            save_file(WEIGHTS, folder / "a.safetensors")
            change(folder)
            return read(folder)

    return call


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(*values: bytes, tensors: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None) -> bytes:
    """A file of these values and tensors."""
    tensor_count, value_count = counts or (len(tensors), len(values))
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, value_count) + b"".join((*values, *tensors))


def of_gguf(*values: bytes, **more: Any) -> Callable[[], Any]:
    return lambda: load_gguf(gguf(*values, **more))


NAME = text("general.architecture") + struct.pack("<I", 8) + text("llama")
BLOCKS = text("llama.block_count") + struct.pack("<II", 4, 2)


def array(key: str, kind: int, count: int) -> bytes:
    return text(key) + struct.pack("<IIQ", 9, kind, count)


def real_gguf() -> bytes:
    with TemporaryDirectory() as name:
        write_gguf(path := Path(name) / "a.gguf", tiny_llama())
        return path.read_bytes()


def nan_gguf() -> bytes:
    with TemporaryDirectory() as name:
        model = tiny_llama()
        with torch.no_grad():
            model.model.norm.weight[3] = torch.nan
        write_gguf(path := Path(name) / "a.gguf", model)
        return path.read_bytes()


def weight(tensor: torch.Tensor) -> Callable[[], Any]:
    """To load a file in which one weight is another."""
    return lambda: load(weights=WEIGHTS | {"model.norm.weight": tensor})


def of_many_axes() -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [0] * 65, "data_offsets": [0, 0]}}).encode()
    return struct.pack("<Q", len(header)) + header


VALUE = ValueError
DEEP = '{"a":' * 100_000
FILES = [
    bad("index-without-map", of_index({}), VALUE, "weight_map of model.safetensors.index.json in", "got None"),
    bad("index-of-a-list", of_index([1]), VALUE, "model.safetensors.index.json in", "JSON object, got a list"),
    bad("map-is-a-list", of_index({"weight_map": ["a"]}), VALUE, "weight_map of model.safe", "got a list"),
    bad("file-is-a-number", of_index({"weight_map": {"a": 3}}), VALUE, "weight_map of model.safe", "got 3 for a"),
    bad("file-above", of_index({"weight_map": {"a": "../b"}}), VALUE, "its own folder", "'../b' for a"),
    bad("file-anywhere", of_index({"weight_map": {"a": "/b"}}), VALUE, "its own folder", "'/b' for a"),
    bad("file-of-a-drive", of_index({"weight_map": {"a": "C:b"}}), VALUE, "its own folder", "'C:b' for a"),
    bad("file-of-a-long-name", of_index({"weight_map": {"a": "b" * 256}}), VALUE, "its own folder", "'b.* for a"),
    bad(
        "index-is-a-folder",
        of_folder(lambda folder: (folder / "model.safetensors.index.json").mkdir()),
        FileNotFoundError,
        "model.safetensors is not in it",
    ),
    bad(
        "many-axes",
        of_folder(lambda folder: (folder / "model.safetensors").write_bytes(of_many_axes())),
        VALUE,
        "model.safetensors in",
        "64",
    ),
    bad("int-weight", weight(torch.ones(32).to(torch.int8)), VALUE, "model.norm.weight is torch.int8", "floating"),
    bad("bool-weight", weight(torch.ones(32).bool()), VALUE, "model.norm.weight is torch.bool", "floating"),
    bad("complex-weight", weight(torch.ones(32) + 1j), VALUE, "model.norm.weight is torch.complex64", "floating"),
    bad("labels", of_config(num_labels=10**9), VALUE, "num_labels of config.json in", "the longest axis of a tensor"),
    bad("labels-within", of_config(text_config={"num_labels": 10**9}), VALUE, "num_labels of config.json in"),
    bad("deep-config", lambda: load(DEEP), VALUE, "config.json in", "is not JSON"),
    bad("deep-index", lambda: load(index=DEEP), VALUE, "model.safetensors.index.json in", "is not JSON"),
    bad("type-is-a-list", of_config(model_type=["llama"]), VALUE, "the architecture a list is not known"),
    bad("no-heads", of_config(num_attention_heads=0), VALUE, "num_attention_heads of config.json in", "got 0"),
    bad("negative-size", of_config(hidden_size=-8), VALUE, "hidden_size of config.json in", "at least 1", "got -8"),
    bad("size-is-a-text", of_config(vocab_size="64"), VALUE, "vocab_size of config.json in", "got '64'"),
    bad("huge-size", of_config(hidden_size=10**30), VALUE, "hidden_size of config.json in", "fit an int32"),
    bad("million-layers", of_config(num_hidden_layers=10**6), VALUE, "num_hidden_layers of config.json in", "1000000"),
    bad("million-layers-of-t5", of_config(num_layers=10**6), VALUE, "num_layers of config.json in", "1000000"),
    bad(
        "million-layers-within", of_config(text_config={"num_hidden_layers": 10**6}), VALUE, "config.json in", "1000000"
    ),
    bad("rope-is-a-number", of_config(rope_parameters=5), VALUE, "config.json in"),
    bad("kinds-are-a-number", of_config(layer_types=7, model_type="qwen3"), VALUE, "config.json in"),
    bad("epsilon-is-a-text", of_config(rms_norm_eps="x"), VALUE, "config.json in"),
    bad(
        "nan",
        lambda: load(weights=WEIGHTS | {"model.norm.weight": torch.full((32,), torch.nan)}),
        VALUE,
        "model.norm.weight in model.safetensors holds NaN",
    ),
    bad("gguf-empty", lambda: load_gguf(b""), VALUE, "a.gguf in", "not a whole GGUF file"),
    bad("gguf-magic", lambda: load_gguf(b"GGUF"), VALUE, "a.gguf in", "not a whole GGUF file", "ends at byte 4"),
    bad("gguf-other", lambda: load_gguf(b"PK\3\4" * 9), VALUE, "a.gguf in", "does not begin with GGUF"),
    bad("gguf-version", lambda: load_gguf(b"GGUF\0\0\0\3" + bytes(40)), VALUE, "a.gguf in", "version must be 2 or 3"),
    bad("gguf-nothing", of_gguf(), VALUE, "general.architecture of a.gguf is not known, got None"),
    bad("gguf-unknown", lambda: load_gguf(gguf(NAME).replace(b"llama", b"lumma")), VALUE, "of a.gguf", "got 'lumma'"),
    bad("gguf-no-layers", of_gguf(NAME), VALUE, "llama.block_count of a.gguf", "got None"),
    bad("gguf-no-tensors", of_gguf(NAME, BLOCKS), VALUE, "llama.block_count of a.gguf", "number of tensors, 0, got 2"),
    bad("gguf-values", of_gguf(NAME, counts=(0, 2**62)), VALUE, "a.gguf in", "not a whole GGUF file"),
    bad("gguf-tensors", of_gguf(NAME, counts=(2**62, 1)), VALUE, "a.gguf in", "not a whole GGUF file"),
    bad("gguf-array", of_gguf(NAME, array("a", 0, 2**40)), VALUE, "a.gguf in", "a has 1099511627776 elements"),
    bad("gguf-texts", of_gguf(NAME, array("a", 8, 2**20)), VALUE, "a.gguf in", "not a whole GGUF file"),
    bad("gguf-numbers", of_gguf(NAME, array("a", 0, 2**20)), VALUE, "a.gguf in", "not a whole GGUF file"),
    bad(
        "gguf-nested", of_gguf(NAME, array("a", 9, 1) * 500), VALUE, "a.gguf in", "a is an array of the unknown type 9"
    ),
    bad("gguf-type", of_gguf(text("a") + struct.pack("<I", 99)), VALUE, "a.gguf in", "a is of the unknown type 99"),
    bad("gguf-text", of_gguf(struct.pack("<Q", 2**63)), VALUE, "a.gguf in", "not a whole GGUF file"),
    bad(
        "gguf-axes",
        of_gguf(NAME, tensors=(text("w") + struct.pack("<I", 2**20) + b"\xff" * 2**23,)),
        VALUE,
        "a.gguf in",
        "tensor w has 1048576 axes, more than 4",
    ),
    bad("gguf-cut", lambda: load_gguf(real_gguf()[:-1000]), VALUE, "a.gguf in", "tensor .* ends 9.. bytes after it"),
    bad("gguf-nan", lambda: load_gguf(nan_gguf()), VALUE, "model.norm.weight in a.gguf holds NaN"),
    bad("gguf-elsewhere", lambda: models.load(".", gguf_file="../a.gguf"), VALUE, "without a path", "'../a.gguf'"),
]

test_file = pytest.mark.filterwarnings("ignore")(refusals(FILES))


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_made_of_a_size_that_a_file_claims() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for row in FILES:
        refusal(row.call, row.error)
    # In KiB: of what is claimed, the least takes a gigabyte.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19


def is_shown(message: str) -> bool:
    """Whether a terminal shows a message as it is, and a reader reads it."""
    return message.isprintable() and len(message) < 8000


def test_names_in_files_steer_no_terminal_and_fill_none() -> None:
    many = {f"{STEERING}{i}" + "a" * 300: torch.ones(1) for i in range(2_000)}
    assert is_shown(refusal(lambda: load(weights=WEIGHTS | many), VALUE))
    assert is_shown(refusal(of_index({"weight_map": {STEERING: STEERING * 9_999}}), VALUE))
    assert is_shown(refusal(of_config(model_type=STEERING * 9_999), VALUE))
    assert is_shown(refusal(of_config(hidden_act=STEERING * 9_999), VALUE))
    assert is_shown(refusal(of_gguf(array(STEERING * 99, 0, 2**40)), VALUE))


def test_names_of_files_steer_no_terminal(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / f"{STEERING}{i}").touch()
    assert is_shown(refusal(lambda: models.load(tmp_path), FileNotFoundError))


def problem(call: Callable[[], object]) -> str | None:
    """The message of the ``ValueError`` of a call, if it raises one."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


@given(st.data())
def test_any_value_in_a_configuration_loads_or_is_a_value_error(data: st.DataObject) -> None:
    value: Any = data.draw(
        st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats() | st.text(max_size=3) | st.lists(st.integers())
    )
    key = data.draw(st.sampled_from(sorted(CONFIG)))
    message = problem(lambda: load(CONFIG | {key: value}))
    assert message is None or re.search("config.json|model_type|the weights do not fit", message)


@given(st.binary(max_size=64), st.integers(0, 2**12))
def test_any_bytes_in_a_gguf_file_load_or_are_a_value_error(junk: bytes, at: int) -> None:
    content = real_gguf()
    message = problem(lambda: load_gguf(content[:at] + junk + content[at + len(junk) :]))
    assert message is None or "a.gguf" in message
