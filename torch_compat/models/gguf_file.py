"""Models in GGUF files, as Transformers reads them. What it would leave out silently is an error here."""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from jaxmask import checks
from torch_compat.models.checkpoints import FROM_FILES_ALONE, check_count, file_in, refuse_nan
from torch_compat.models.gguf_header import Header, read_header


def read(folder: Path, file: str) -> PreTrainedModel:
    """The model in a GGUF file, with weights in float32.

    Raises:
        ValueError: the file is not whole; a tensor is left over, missing or of another size; a weight is NaN; or rotary
            embeddings are scaled, which Transformers ignores.
    """
    path = file_in(folder, file)
    header = read_header(path)
    architecture = header.metadata.get("general.architecture")
    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    if not isinstance(architecture, str) or architecture not in numbers:
        raise ValueError(f"general.architecture of {file} is not known, got {checks.describe(architecture)}")
    scaling = header.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(
            f"rope.scaling.type of {file} must be 'none', got {checks.describe(scaling)}, which Transformers does not "
            "read from GGUF: load the checkpoint of safetensors"
        )
    layers = header.metadata.get(f"{architecture}.block_count")
    check_count(f"{architecture}.block_count of {file}", layers, len(header.elements), "the number of tensors")
    # The whole path, for Transformers would prefer a file of this name in the current folder.
    how: dict[str, Any] = {"gguf_file": str(path.resolve()), **FROM_FILES_ALONE}
    with _naming(file):
        config = AutoConfig.from_pretrained(folder, **how)
        with torch.device("meta"):
            described = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    names = get_tensor_name_map(numbers[architecture], config.num_hidden_layers)
    _refuse(file, described, _check(header, described, names.get_name))
    with _naming(file):
        from_pretrained: Any = AutoModelForCausalLM.from_pretrained
        model, problems = from_pretrained(folder, config=config, dtype=torch.float32, output_loading_info=True, **how)
    # Transformers makes missing weights at random.
    _refuse(file, model, problems)
    for name, tensor in model.state_dict().items():
        refuse_nan(file, name, tensor)
    return model


def _check(header: Header, described: PreTrainedModel, name_of: Callable[[str], str | None]) -> dict[str, list[str]]:
    """The tensors that do not fit the model that the metadata describes, known before it takes any memory."""
    given, needed = header.elements, dict[str, int]()
    tied = "lm_head.weight" if described.config.tie_word_embeddings else None
    problems: dict[str, list[str]] = {"missing_keys": [], "left_over": [], "mismatched_keys": []}
    for name, tensor in described.state_dict().items():
        stem, _, kind = name.rpartition(".")
        source = f"{name_of(stem)}.{kind}"
        needed[source] = tensor.numel()
        if source not in given and name != tied:
            problems["missing_keys"].append(name)
        elif given.get(source, needed[source]) != needed[source]:
            problems["mismatched_keys"].append(f"{source} of {given[source]} elements and not {needed[source]}")
    problems["left_over"] = [checks.shown(name) for name in sorted(given.keys() - needed.keys())]
    return problems


def _refuse(file: str, model: PreTrainedModel, problems: Mapping[str, Iterable[Any]]) -> None:
    parts = [f"{what}: {checks.several(sorted(map(str, names)))}" for what, names in problems.items() if names]
    if parts:
        raise ValueError(f"the weights of {file} do not fit {type(model).__name__}: {'. '.join(parts)}")


@contextmanager
def _naming(file: str) -> Generator[None]:
    """Name the file in what Transformers raises where the metadata is not as it expects."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{file} is not a GGUF file that Transformers can read: {type(error).__name__}: {checks.shown(str(error))}"
        ) from error
