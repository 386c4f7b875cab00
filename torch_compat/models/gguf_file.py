"""Models in GGUF files, as Transformers reads them. What it would leave out silently is an error here."""

from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
from transformers import AutoModelForCausalLM, PreTrainedModel


def read(folder: Path, file: str) -> PreTrainedModel:
    """The model in a GGUF file, with weights in float32.

    Raises:
        ValueError: a tensor is left over or missing; or rotary embeddings are scaled, which Transformers ignores.
    """
    reader = GGUFReader(folder / file)
    architecture = reader.fields["general.architecture"].contents()
    scaling = reader.get_field(f"{architecture}.rope.scaling.type")
    if scaling is not None and scaling.contents() != "none":
        raise ValueError(
            f"rope.scaling.type of {file} must be 'none', got {scaling.contents()!r}, which Transformers does not "
            "read from GGUF: load the checkpoint of safetensors"
        )
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    model, problems = from_pretrained(folder, gguf_file=file, dtype=torch.float32, output_loading_info=True)
    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(numbers[architecture], model.config.num_hidden_layers)
    parts = [name.rpartition(".") for name in model.state_dict()]
    known = {f"{names.get_name(stem)}.{kind}" for stem, _, kind in parts}
    problems["left_over"] = {tensor.name for tensor in reader.tensors} - known
    # Transformers makes missing weights at random.
    problems = {what: sorted(names) for what, names in problems.items() if names}
    if problems:
        raise ValueError(f"the weights of {file} do not fit {type(model).__name__}: {problems}")
    return model
