"""The files of a checkpoint folder, which may come from anywhere: nothing of them is run, and no other file is read.

A missing or broken file is an error that says what to do.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from jaxmask import checks

# For each function of Transformers that reads a folder: it runs no code of the folder, and asks no server.
FROM_FILES_ALONE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}

# The names of numbers of layers and of other sizes, at any depth of a configuration.
_LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    *("d_model", "d_kv", "d_ff", "num_heads"),
)


def read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder, which stay mapped to their files."""
    # Transformers looks for a single file first, too.
    files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / files[0]).is_file() and index.is_file():
        files = _shards(index)
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        path = file_in(folder, file)
        try:
            # safe_open is not typed.
            opened: Any = safe_open(path, framework="pt")
            with opened as tensors:
                read = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
            for name, tensor in read.items():
                refuse_nan(file, name, tensor)
        except (SafetensorError, RuntimeError) as error:  # PyTorch computes with 64 axes at most
            raise ValueError(
                f"{file} in {str(folder)!r} is not a whole safetensors file ({checks.shown(str(error))}): download it "
                "again, and if it is a pointer of Git LFS, by `git lfs pull`"
            ) from error
        weights |= read
    return weights


def _shards(index: Path) -> list[str]:
    """The files that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"weight_map of {index.name} in {str(index.parent)!r} must be a JSON object of the file of each weight, "
            f"got {checks.describe(weight_map)}"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise ValueError(
                f"weight_map of {index.name} in {str(index.parent)!r} must name files in its own folder, got "
                f"{checks.describe(file)} for {checks.shown(name)}"
            )
    return sorted(set(weight_map.values()))


def refuse_nan(file: str, name: str, tensor: torch.Tensor) -> None:
    """Refuse a weight that holds NaN: all that is computed with it would be NaN, too."""
    if tensor.is_floating_point() and tensor.isnan().any():
        raise ValueError(f"{checks.shown(name)} in {file} holds NaN: download the file again")


def file_in(folder: Path, name: str) -> Path:
    """The path of a file that a checkpoint folder must have."""
    if not _is_plain(name):
        raise ValueError(f"a file of a checkpoint folder must be named without a path, got {checks.describe(name)}")
    if not (folder / name).is_file():
        names = checks.several(sorted(checks.shown(path.name) for path in folder.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"source is not a checkpoint that can be read, {checks.shown(name)} is not in it: {str(folder)!r} has "
            f"{names}; save a model by model.save_pretrained(folder), or say gguf_file= for a GGUF file"
        )
    return folder / name


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file in a folder, and not a path, by the rules of any system."""
    return (
        name.isprintable() and 0 < len(name.encode()) < 256 and not set(name) & set("/\\:") and name not in (".", "..")
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} in {str(path.parent)!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} in {str(path.parent)!r} must be a JSON object, got {checks.describe(content)}")
    return content


def check_config(path: Path, config: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse sizes in a configuration that are none, before anything is made of that size."""
    where = f"{path.name} in {str(path.parent)!r}"
    for name in _SIZES:
        if config.get(name) is not None:
            try:
                checks.integer(f"{name} of {where}", config[name], 1)
            except TypeError as error:
                raise ValueError(str(error)) from error
    for name in _LAYERS:
        if config.get(name) is not None:
            check_count(f"{name} of {where}", config[name], len(weights), "the number of tensors")
    if config.get("num_labels") is not None:
        # Transformers makes a name for each.
        longest = max((size for tensor in weights.values() for size in tensor.shape), default=0)
        check_count(f"num_labels of {where}", config["num_labels"], longest, "the longest axis of a tensor")
    for part in config.values():
        if isinstance(part, dict):
            check_config(path, part, weights)


def check_count(name: str, count: Any, most: int, what: str) -> None:
    """Refuse more layers, or labels, than a file can hold: to describe them alone takes minutes, or all memory."""
    if not isinstance(count, int) or not 1 <= count <= most:
        raise ValueError(f"{name} must be from 1 to {what}, {most}, got {checks.describe(count)}")
