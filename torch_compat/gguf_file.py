"""Models of GGUF files, as Transformers reads them; but what it would leave out without a word is refused."""

from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
from transformers import AutoModelForCausalLM, PreTrainedModel


def read(folder: Path, file: str) -> PreTrainedModel:
    """The model in a file, its weights in float32.

    Raises:
        ValueError: a tensor is left over or missing; or rotary embeddings are scaled, which Transformers does not read.
    """
    reader = GGUFReader(folder / file)
    architecture = reader.fields["general.architecture"].contents()
    scaling = reader.get_field(f"{architecture}.rope.scaling.type")
    if scaling is not None and scaling.contents() != "none":
        raise ValueError(
            f"rope.scaling.type of {file} must be 'none', for Transformers reads no other of GGUF, got "
            f"{scaling.contents()!r}: take the checkpoint of safetensors"
        )
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    model, found = from_pretrained(folder, gguf_file=file, dtype=torch.float32, output_loading_info=True)
    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(numbers[architecture], model.config.num_hidden_layers)
    parts = [name.rpartition(".") for name in model.state_dict()]
    known = {f"{names.get_name(stem)}.{kind}" for stem, _, kind in parts}
    found["left_over"] = {tensor.name for tensor in reader.tensors} - known
    # What is missing, Transformers makes at random.
    if problems := {what: sorted(names) for what, names in found.items() if names}:
        raise ValueError(f"the weights of {file} do not fit {type(model).__name__}: {problems}")
    return model
