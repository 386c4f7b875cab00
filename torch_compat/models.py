"""Weights from Transformers, of a model object or a checkpoint folder, into models of :mod:`jaxmask.flax`.

An :class:`Architecture` is data: which module of ours it is, and where each weight goes. What does not fit is an error
that names every weight: nothing is left over, and nothing is left at random.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jaxtyping import DTypeLike
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from jaxmask import checks
from jaxmask.flax import Encoder, EncoderConfig
from torch_compat import decoders
from torch_compat.bridge import to_jax
from torch_compat.gguf_file import read as read_gguf
from torch_compat.names import Names, embedding, linear, norm

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Architecture:
    """How a model of Transformers becomes one of ours.

    Args:
        module: our class and our configuration, for a configuration of Transformers; raises ``ValueError`` for one
            that asks for what our class does not do. It is called as ``class(config, param_dtype=..., rngs=...)``.
        names: for our configuration, where each weight goes.
        rename: brings the names of a checkpoint to those of ``names``, where there are several ways to say them.
        unused: a regular expression of the names of weights that our class has no use for.
        ties: for a name, that of the weight it is the same as. It may be absent, and is not needed in ``names``.
    """

    module: Callable[[Any], tuple[type[Any], Any]]
    names: Callable[[Any], Names]
    rename: Callable[[str], str] = str
    unused: str = "(?!)"
    ties: Mapping[str, str] = field(default_factory=dict[str, str])


def load(source: PreTrainedModel | str | Path, *, gguf_file: str | None = None, dtype: DTypeLike = jnp.float32) -> Any:
    """A model of ours with the weights of a model of Transformers.

    Args:
        source: a model object; or a checkpoint folder, with ``config.json`` and safetensors in one file or several, of
            which no PyTorch model is made. Nothing is downloaded.
        gguf_file: the name of a GGUF file in that folder, to be read by Transformers, in place of safetensors.
        dtype: of the parameters, and so of what is computed; the norms of a decoder keep float32.

    Returns:
        An ``nnx.Module``: what :data:`ARCHITECTURES` says of the ``model_type``. It shares no memory with the source.

    Raises:
        FileNotFoundError: the folder, or what a checkpoint consists of, is not there.
        ValueError: an architecture that is not known, or a setting of it; a weight is left over, missing or of the
            wrong shape; a file is broken.
        TypeError: the source is neither a model nor a path, or the dtype is not floating.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> encoder = load(BertModel(BertConfig(**sizes)))
    >>> encoder(jnp.array([[101, 2054, 102]])).shape
    (1, 3, 16)
    """
    dtype = checks.float_dtype(dtype)
    if isinstance(source, PreTrainedModel):
        if gguf_file is not None:
            raise ValueError(f"gguf_file is for a folder, got {gguf_file!r} with a model object: leave it out")
        return assemble(_architecture(source.config.model_type), source.config, source.state_dict(), dtype)
    if not isinstance(source, str | Path):
        raise TypeError(f"source must be a Transformers model or the path of a folder, got {checks.describe(source)}")
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"source is not a folder: {str(source)!r}; nothing is downloaded, so download it first")
    if gguf_file is not None:
        _file(folder, gguf_file)
        return load(read_gguf(folder, gguf_file), dtype=dtype)
    architecture = _architecture(_json(_file(folder, "config.json")).get("model_type"))
    return assemble(architecture, AutoConfig.from_pretrained(folder), _safetensors(folder), dtype)


def assemble(
    architecture: Architecture, config: PretrainedConfig, weights: Weights, dtype: DTypeLike = jnp.float32
) -> Any:
    """The module of an architecture, filled with weights; no random ones are made.

    Args:
        architecture: of which one.
        config: as Transformers has it.
        weights: by their names in Transformers.
        dtype: as in :func:`load`.

    Returns:
        An ``nnx.Module``.

    Raises:
        ValueError: a weight is left over, missing or of the wrong shape, each named; a setting is not known.
    """
    make, ours = architecture.module(config)
    graph, state = nnx.split(nnx.eval_shape(lambda: make(ours, param_dtype=dtype, rngs=nnx.Rngs(0))))
    parameters = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    names = architecture.names(ours)
    filled: dict[Any, Any] = {}
    renamed = {architecture.rename(name): tensor for name, tensor in weights.items()}
    problems = [problem for name in renamed if name not in names for problem in _left_over(name, renamed, architecture)]
    sources: dict[str, list[str]] = {}
    for name, place in names.items():
        sources.setdefault(place.parameter, []).append(name)
    for target, (path, variable) in parameters.items():
        parts = sources[target]
        if missing := [name for name in parts if name not in renamed]:
            problems += [f"{name} is missing, for {target}" for name in missing]
            continue
        try:
            # In float32, for what is added to a weight of half precision would be rounded.
            tensors = [names[name].transform(renamed[name].detach().float()) for name in parts]
        except (ValueError, RuntimeError, IndexError, TypeError):
            tensors = [renamed[name] for name in parts]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        sizes = [names[name].size or variable.shape[0] for name in parts]
        if shapes != [(size, *variable.shape[1:]) for size in sizes]:
            what = ", ".join(f"{name} is {list(shape)}" for name, shape in zip(parts, shapes, strict=True))
            of_parts = f", its parts {sizes}" if len(parts) > 1 else ""
            problems.append(f"{what} where {target} is {list(variable.shape)}{of_parts}")
            continue
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        # A copy, for the source may be trained on; and not committed to a device, as arrays from DLPack are.
        copy = jnp.array(np.asarray(to_jax(tensor.to(getattr(torch, variable.dtype.name)))))
        filled[path] = variable.replace(copy)
    if problems:
        raise ValueError(
            f"the weights do not fit {make.__name__}: {'; '.join(problems)}. Is it the "
            "checkpoint of another kind of model, or of another config.json?"
        )
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _left_over(name: str, weights: Weights, architecture: Architecture) -> list[str]:
    """What is wrong with a weight that goes nowhere."""
    if re.fullmatch(architecture.unused, name):
        return []
    twin = architecture.ties.get(name)
    if twin is not None and twin in weights:
        return [] if torch.equal(weights[name], weights[twin]) else [f"{name} is not equal to {twin}, its twin"]
    return [f"{name} {checks.describe(weights[name])} is left over"]


def _architecture(model_type: Any) -> Architecture:
    if model_type not in ARCHITECTURES:
        known = ", ".join(map(repr, ARCHITECTURES))
        raise ValueError(f"the architecture {model_type!r} is not known: model_type must be one of {known}")
    return ARCHITECTURES[model_type]


def _safetensors(folder: Path) -> Weights:
    """The tensors of a folder, mapped from their files."""
    files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / files[0]).exists() and index.exists():  # in the order in which Transformers looks
        files = sorted(set(_json(index)["weight_map"].values()))
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        path = _file(folder, file)
        try:
            # safe_open says so little of its types.
            opened: Any = safe_open(path, framework="pt")
            with opened as tensors:
                weights |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{file} in {str(folder)!r} is not a whole safetensors file ({error}): download it again, and if it "
                "is a pointer of Git LFS, by `git lfs pull`"
            ) from error
    return weights


def _file(folder: Path, name: str) -> Path:
    """A file that a checkpoint folder must have."""
    if not (folder / name).is_file():
        there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"source is not a checkpoint that can be read, {name} is not in it: {str(folder)!r} has {there}; save a "
            "model by model.save_pretrained(folder), or say gguf_file= for a GGUF file"
        )
    return folder / name


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name} in {str(path.parent)!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} in {str(path.parent)!r} must be a JSON object, got {checks.describe(content)}")
    return content


def _bert(config: Any) -> tuple[type[Encoder], EncoderConfig]:
    supported: dict[str, Any] = {"hidden_act": "gelu", "is_decoder": False, "position_embedding_type": "absolute"}
    for name, value in supported.items():
        if (given := getattr(config, name, value)) != value:
            raise ValueError(f"{name} of the config must be {value!r} for Encoder, got {given!r}")
    return Encoder, EncoderConfig(
        vocab_size=config.vocab_size,
        dim=config.hidden_size,
        hidden_dim=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        max_length=config.max_position_embeddings,
        token_types=config.type_vocab_size,
        epsilon=config.layer_norm_eps,
    )


def _bert_names(config: EncoderConfig) -> Names:
    names: Names = {}
    for theirs, ours in (("word", "words"), ("position", "positions"), ("token_type", "types")):
        names |= embedding(f"embeddings.{theirs}_embeddings", ours)
    names |= norm("embeddings.LayerNorm", "norm")
    for i in range(config.layers):
        theirs, ours = f"encoder.layer.{i}", f"layers.{i}"
        for name in ("query", "key", "value"):
            names |= linear(f"{theirs}.attention.self.{name}", f"{ours}.{name}")
        names |= linear(f"{theirs}.attention.output.dense", f"{ours}.out")
        names |= norm(f"{theirs}.attention.output.LayerNorm", f"{ours}.attention_norm")
        names |= linear(f"{theirs}.intermediate.dense", f"{ours}.up")
        names |= linear(f"{theirs}.output.dense", f"{ours}.down")
        names |= norm(f"{theirs}.output.LayerNorm", f"{ours}.mlp_norm")
    return names


def _bert_rename(name: str) -> str:
    # Under a head, the encoder has a name of its own; the oldest checkpoints have TensorFlow's names for the norms.
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


# Old checkpoints hold the frequencies of rotary embeddings.
_decoder: Any = partial(
    Architecture, unused=r".*\.rotary_emb\.inv_freq", ties={"lm_head.weight": "model.embed_tokens.weight"}
)
# By the model_type of a configuration. The heads of BERT's pretraining are no part of an encoder.
ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(_bert, _bert_names, _bert_rename, unused=r"(pooler|cls)\..*|embeddings\.position_ids"),
    "llama": _decoder(decoders.llama, decoders.decoder_names),
    "mistral": _decoder(decoders.mistral, decoders.decoder_names),
    "qwen2": _decoder(decoders.qwen2, decoders.decoder_names),
    "qwen3": _decoder(decoders.qwen3, decoders.decoder_names),
    "gemma2": _decoder(decoders.gemma2, decoders.gemma_names),
    "gemma3_text": _decoder(decoders.gemma3, decoders.gemma_names),
    "llama4_text": _decoder(decoders.llama4, decoders.llama4_names),
}
