"""The files of a checkpoint folder. A missing or broken file is an error that says what to do."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from jaxmask import checks


def read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder, which stay mapped to their files."""
    # Transformers looks for a single file first, too.
    files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / files[0]).exists() and index.exists():
        files = sorted(set(read_json(index)["weight_map"].values()))
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        path = file_in(folder, file)
        try:
            # safe_open is not typed.
            opened: Any = safe_open(path, framework="pt")
            with opened as tensors:
                weights |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{file} in {str(folder)!r} is not a whole safetensors file ({error}): download it again, and if it "
                "is a pointer of Git LFS, by `git lfs pull`"
            ) from error
    return weights


def file_in(folder: Path, name: str) -> Path:
    """The path of a file that a checkpoint folder must have."""
    if not (folder / name).is_file():
        names = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"source is not a checkpoint that can be read, {name} is not in it: {str(folder)!r} has {names}; save a "
            "model by model.save_pretrained(folder), or say gguf_file= for a GGUF file"
        )
    return folder / name


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name} in {str(path.parent)!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} in {str(path.parent)!r} must be a JSON object, got {checks.describe(content)}")
    return content
