"""Models of :mod:`jaxmask.flax` with the weights of Transformers, from a model object or a checkpoint folder.

An :class:`Architecture` says which module of ours a model becomes and where each weight goes. Weights that do not fit
are an error that names them all. No weight is left over, and no parameter stays random.
"""

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
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from jaxmask import checks
from jaxmask.flax.models import axes
from torch_compat.bridge import to_jax
from torch_compat.models import decoders, encoders, t5
from torch_compat.models.checkpoints import FROM_FILES_ALONE, check_config, file_in, read_json, read_safetensors
from torch_compat.models.gguf_file import read as read_gguf
from torch_compat.models.names import Names, embedding, linear, norm

__all__ = ["ARCHITECTURES", "Architecture", "Names", "assemble", "embedding", "linear", "load", "norm"]

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Architecture:
    """How a model of Transformers becomes one of ours.

    Args:
        module: returns our class and our configuration for a configuration of Transformers, or raises a
            ``ValueError`` where our class lacks a setting. The class is called with ``(config, param_dtype=, rngs=)``.
        names: returns for our configuration where each weight goes.
        rename: turns a name in a checkpoint into one of ``names``, where weights have had several names.
        unused: a regular expression for the names of weights that our class does not use.
        ties: for the name of a weight, the name of the weight that it equals. It may be absent from a checkpoint.
    """

    module: Callable[[Any], tuple[type[Any], Any]]
    names: Callable[[Any], Names]
    rename: Callable[[str], str] = str
    unused: str = "(?!)"
    ties: Mapping[str, str] = field(default_factory=dict[str, str])


def load(source: PreTrainedModel | str | Path, *, gguf_file: str | None = None, dtype: DTypeLike = jnp.float32) -> Any:
    """A model of ours with the weights of a model of Transformers.

    Args:
        source: a model object; or a checkpoint folder with ``config.json`` and one or several files of safetensors,
            which are read without making a PyTorch model. Nothing is downloaded.
        gguf_file: the name of a GGUF file in that folder. Transformers reads it in place of safetensors.
        dtype: the floating dtype of the parameters and of what is computed. The norms of a decoder keep float32.

    Returns:
        The ``nnx.Module`` that :data:`ARCHITECTURES` has for the ``model_type``. It shares no memory with the source.

    Raises:
        FileNotFoundError: the folder or a file of it is missing.
        ValueError: the architecture, or a setting of it, is not known; a weight is left over, missing, of the wrong
            shape or NaN; a file is broken, or names a file of another folder.
        TypeError: ``source`` is neither a model nor a path, or ``dtype`` is not floating.

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
        return load(read_gguf(folder, gguf_file), dtype=dtype)
    path = file_in(folder, "config.json")
    architecture = _architecture((content := read_json(path)).get("model_type"))
    weights = read_safetensors(folder)
    check_config(path, content, weights)
    try:
        config: Any = AutoConfig.from_pretrained(folder, **FROM_FILES_ALONE)
        architecture.module(config)
    except Exception as error:
        # Transformers checks little of what it reads. Our own refusals are ValueErrors.
        what = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"config.json in {str(folder)!r} cannot be used: {what}{checks.shown(str(error))}") from error
    return assemble(architecture, config, weights, dtype)


def assemble(
    architecture: Architecture, config: PretrainedConfig, weights: Weights, dtype: DTypeLike = jnp.float32
) -> Any:
    """The module of an architecture, filled with weights. No random weights are made on the way.

    Args:
        architecture: says which module it is and where the weights go.
        config: a configuration of Transformers.
        weights: tensors by their names in Transformers.
        dtype: as in :func:`load`.

    Returns:
        An ``nnx.Module``.

    Raises:
        ValueError: weights are left over, missing or of the wrong shape, and all are named; a setting is not known.
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
        if others := [name for name in parts if not renamed[name].is_floating_point()]:
            problems += [f"{name} is {renamed[name].dtype} and must be floating, for {target}" for name in others]
            continue
        try:
            # In float32: a sum with a weight of half precision would be rounded.
            tensors = [names[name].transform(renamed[name].detach().float()) for name in parts]
        except (ValueError, RuntimeError, IndexError, TypeError):
            tensors = [renamed[name] for name in parts]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        expected = [names[name].whole(variable.shape) for name in parts]
        if shapes != expected:
            what = ", ".join(f"{name} is {list(shape)}" for name, shape in zip(parts, shapes, strict=True))
            problems.append(f"{what} where {target} takes {', '.join(str(list(shape)) for shape in expected)}")
            continue
        tensors = [
            tensor.reshape(names[name].part(variable.shape)) for name, tensor in zip(parts, tensors, strict=True)
        ]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors, names[parts[0]].axis)
        # A copy, since the source may be trained on, and one that is not committed to a device.
        copy = jnp.array(np.asarray(to_jax(tensor.to(getattr(torch, variable.dtype.name)))))
        # A module of another's may have no names for its dimensions.
        filled[path] = variable.replace(axes.placed(copy, *variable.get_metadata("out_sharding", ())))
    if problems:
        raise ValueError(
            f"the weights do not fit {make.__name__}: {checks.several(problems)}. Is it the "
            "checkpoint of another kind of model, or of another config.json?"
        )
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _left_over(name: str, weights: Weights, architecture: Architecture) -> list[str]:
    """The problems of a weight that has no place in the module: none where that is expected."""
    if re.fullmatch(architecture.unused, name):
        return []
    twin = architecture.ties.get(name)
    if twin is not None and twin in weights:
        return [] if torch.equal(weights[name], weights[twin]) else [f"{name} is not equal to {twin}, its twin"]
    return [f"{checks.shown(name)} {checks.describe(weights[name])} is left over"]


def _architecture(model_type: Any) -> Architecture:
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        known = ", ".join(map(repr, ARCHITECTURES))
        raise ValueError(
            f"the architecture {checks.describe(model_type)} is not known: model_type must be one of {known}"
        )
    return ARCHITECTURES[model_type]


# Old checkpoints hold the frequencies of rotary embeddings, too.
_decoder: Any = partial(
    Architecture, unused=r".*\.rotary_emb\.inv_freq", ties={"lm_head.weight": "model.embed_tokens.weight"}
)
# What turns an image into embeddings is another model.
_with_images: Any = partial(
    _decoder, rename=decoders.text_rename, unused=r"(model\.)?(vision_tower|multi_modal_projector)\..*"
)
# By the model_type of a configuration. An encoder has no use for the heads of BERT's pretraining.
ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(
        encoders.bert, encoders.bert_names, encoders.bert_rename, unused=r"(pooler|cls)\..*|embeddings\.position_ids"
    ),
    "t5": Architecture(
        t5.t5,
        t5.t5_names,
        # The oldest checkpoints have a table of biases for cross-attention, too, which no model reads.
        unused=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        ties={
            f"{name}.weight": "shared.weight" for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
        },
    ),
    "llama": _decoder(decoders.llama, decoders.decoder_names),
    "mistral": _decoder(decoders.mistral, decoders.decoder_names),
    "qwen2": _decoder(decoders.qwen2, decoders.decoder_names),
    "qwen3": _decoder(decoders.qwen3, decoders.decoder_names),
    "gemma": _decoder(decoders.gemma, decoders.gemma_names),
    "gemma2": _decoder(decoders.gemma2, decoders.gemma_names),
    "gemma3_text": _decoder(decoders.gemma3, decoders.gemma_names),
    "llama4_text": _decoder(decoders.llama4, decoders.llama4_names),
    "gemma3": _with_images(decoders.gemma3_with_images, decoders.gemma_names),
    "paligemma": _with_images(decoders.paligemma, decoders.gemma_names),
}
