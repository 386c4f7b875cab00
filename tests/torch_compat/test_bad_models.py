"""Bad input of the loader and of the encoder is refused: the message names what came, and what was expected."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2Model,
    Llama4ForCausalLM,
    Llama4TextConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from jaxmask.flax import Encoder, EncoderConfig, mean_pool
from tests.helpers.bad import bad, refusals
from tests.helpers.tiny import tiny_llama
from tests.torch_compat.test_models import FOUR, MATRIX, TIED
from torch_compat import models

VALUE, TYPE, MISSING = ValueError, TypeError, FileNotFoundError
SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 6,
}
CONFIG = BertConfig(**SIZES)
BERT = BertModel(CONFIG)
WEIGHTS = BERT.state_dict()
KERNEL, BIAS = "encoder.layer.0.output.dense.weight", "embeddings.LayerNorm.bias"
TEXT = json.dumps({"model_type": "bert", **SIZES})
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
TEXT_SIZES: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 4}
T5 = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
GPT2 = GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8)


def load(files: dict[str, str], **how: Any) -> Any:
    """Load a folder with these files, whose content is text."""
    with TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_text(content)
        return models.load(folder, **how)


def load_tensors(**changed: torch.Tensor | None) -> Any:
    """Load a folder whose tensors are those of a model but for a change; ``None`` takes one away."""
    tensors = {name: tensor for name, tensor in {**WEIGHTS, **changed}.items() if tensor is not None}
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(TEXT)
        save_file(tensors, Path(folder) / "model.safetensors")
        return models.load(folder)


def llama(heads: int, kv_heads: int) -> Any:
    return tiny_llama(hidden_size=8, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=2)


def of_llama(**changed: Any) -> Callable[[], Any]:
    return lambda: models.load(tiny_llama(num_hidden_layers=1, **changed))


def of_config(**changed: Any) -> Callable[[], Any]:
    return lambda: models.load(BertModel(BertConfig(**{**SIZES, **changed})))


INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors"}})
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 90868376\n"

FOLDERS = [
    bad("no-folder", lambda: models.load("bert-base-uncased"), MISSING, "source", "'bert-base-uncased'", "downloaded"),
    bad("a-file", lambda: models.load(__file__), MISSING, "source is not a folder", "test_bad_models"),
    bad("empty-folder", lambda: load({}), MISSING, "config.json is not in it", "has nothing", "save_pretrained"),
    bad("gguf-only", lambda: load({"a.gguf": ""}), MISSING, "config.json", "has a.gguf", "say gguf_file="),
    bad("no-gguf", lambda: load({"config.json": TEXT}, gguf_file="a.gguf"), MISSING, "a.gguf is not in", "config.json"),
    bad("no-weights", lambda: load({"config.json": TEXT}), MISSING, "model.safetensors is not in", "has config.json"),
    bad(
        "pickled-weights",
        lambda: load({"config.json": TEXT, "pytorch_model.bin": ""}),
        MISSING,
        "model.safetensors is not in",
        "pytorch_model.bin",
        "save_pretrained",
    ),
    bad(
        "no-shard",
        lambda: load({"config.json": TEXT, "model.safetensors.index.json": INDEX}),
        MISSING,
        "model-1.safetensors is not in",
    ),
    bad(
        "a-pointer",
        lambda: load({"config.json": TEXT, "model.safetensors": LFS}),
        VALUE,
        "model.safetensors in",
        "not a whole safetensors file",
        "git lfs pull",
    ),
    bad("no-json", lambda: load({"config.json": "bert"}), VALUE, "config.json in", "is not JSON"),
    bad(
        "no-json-object",
        lambda: load({"config.json": "[1]"}),
        VALUE,
        "config.json in",
        "must be a JSON object, got a list",
    ),
    bad("no-model-type", lambda: load({"config.json": "{}"}), VALUE, "architecture None is not known", "'bert'"),
]

SOURCES = [
    bad("unknown", lambda: load({"config.json": '{"model_type": "rwkv"}'}), VALUE, "'rwkv' is not known", "'bert'"),
    bad("unknown-object", lambda: models.load(GPT2Model(GPT2)), VALUE, "'gpt2' is not known", "'bert'"),
    bad(
        "gated",
        lambda: models.load(T5ForConditionalGeneration(T5)),
        VALUE,
        "feed_forward_proj .* must be 'relu'",
        "gated",
    ),
    bad("number", lambda: models.load(5), TYPE, "source must be a Transformers model or the path", "5"),  # pyright: ignore[reportArgumentType]
    bad("torch-module", lambda: models.load(torch.nn.Linear(2, 2)), TYPE, "source must be", "a Linear"),  # pyright: ignore[reportArgumentType]
    bad("gguf-of-object", lambda: models.load(BERT, gguf_file="a.gguf"), VALUE, "gguf_file", "'a.gguf'", "leave it"),
    bad("dtype", lambda: models.load(BERT, dtype=jnp.int32), TYPE, "dtype must be floating", "int32"),
    bad("float64", lambda: models.load(BERT, dtype=jnp.float64), VALUE, "float64 is switched off"),
    bad("activation", of_config(hidden_act="relu"), VALUE, "hidden_act of the config must be 'gelu'", "got 'relu'"),
    bad("decoder", of_config(is_decoder=True), VALUE, "is_decoder of the config must be False", "got True"),
]

DECODERS = [
    bad("yarn", of_llama(rope_parameters=YARN), VALUE, "rope_type .* must be one of default, linear", "got 'yarn'"),
    bad("relu", of_llama(hidden_act="relu"), VALUE, "hidden_act of the config must be one of silu", "got 'relu'"),
    bad("not-causal", of_llama(is_causal=False), VALUE, "is_causal of the config must be True", "got False"),
    bad(
        "bidirectional",
        lambda: models.load(Gemma3ForCausalLM(Gemma3TextConfig(**TEXT_SIZES, use_bidirectional_attention=True))),
        VALUE,
        "use_bidirectional_attention of the config must be False",
    ),
    bad(
        "experts",
        lambda: models.load(Llama4ForCausalLM(Llama4TextConfig(**TEXT_SIZES, num_local_experts=2, moe_layers=[0]))),
        VALUE,
        r"moe_layers of the config must be \[\]",
        r"got \[0\]",
    ),
]

FITTING = [
    bad(
        "left-over",
        lambda: models.load(BertForSequenceClassification(CONFIG)),
        VALUE,
        "do not fit Encoder",
        r"classifier.weight .*\[2, 8\] is left over",
        r"classifier.bias .*\[2\] is left over",
    ),
    bad(
        "missing",
        lambda: load_tensors(**{KERNEL: None, BIAS: None}),
        VALUE,
        f"{KERNEL} is missing, for layers.0.down.weight",
        f"{BIAS} is missing, for norm.bias",
    ),
    bad(
        "shape",
        lambda: load_tensors(**{KERNEL: torch.ones(8, 11)}),
        VALUE,
        rf"{KERNEL} is \[8, 11\] where layers.0.down.weight takes \[8, 12\]",
    ),
    bad(
        "heads-of-another-model",
        lambda: models.assemble(models.ARCHITECTURES["llama"], llama(4, 4).config, llama(8, 2).state_dict()),
        VALUE,
        r"q_proj.weight is \[16, 8\], .*k_proj.weight is \[4, 8\], .* where blocks.0.attention.query_key_value.weight "
        r"takes \[8, 8\], \[8, 8\], \[8, 8\]",
    ),
    bad("rank", lambda: load_tensors(**{KERNEL: torch.ones(8, 12, 1)}), VALUE, rf"{KERNEL} is \[8, 12, 1\] where"),
    bad(
        "more-layers",
        lambda: load_tensors(**{"encoder.layer.1.output.dense.bias": torch.ones(8)}),
        VALUE,
        r"encoder.layer.1.output.dense.bias .* is left over",
        "another config.json",
    ),
    bad(
        "tied",
        lambda: models.assemble(TIED, FOUR, {"embed.weight": MATRIX, "lm_head.weight": MATRIX + 1}),
        VALUE,
        "lm_head.weight is not equal to embed.weight",
    ),
    bad(
        "tied-to-nothing",
        lambda: models.assemble(TIED, FOUR, {"lm_head.weight": MATRIX}),
        VALUE,
        "lm_head.weight .* is left over",
        "embed.weight is missing, for words.embedding",
    ),
]

ENCODER = Encoder(EncoderConfig(vocab_size=16, dim=8, hidden_dim=12, layers=1, heads=2, max_length=6), rngs=nnx.Rngs(0))
TOKENS, VALID = np.ones((2, 4), np.int32), np.ones((2, 4), bool)
HIDDEN = jnp.ones((2, 4, 8))


def encode(tokens: Any = TOKENS, *more: Any, **how: Any) -> Any:
    return ENCODER(tokens, *more, **how)


def config(**changed: Any) -> Callable[[], Any]:
    sizes: dict[str, Any] = {"vocab_size": 16, "dim": 8, "hidden_dim": 12, "layers": 1, "heads": 2}
    return lambda: EncoderConfig(**{**sizes, **changed})


ENCODERS = [
    bad("heads", config(heads=3), VALUE, "heads must divide dim", "3 heads and dim 8"),
    bad("no-layers", config(layers=0), VALUE, "layers must be at least 1", "got 0"),
    bad("float-size", config(dim=8.0), TYPE, "dim must be a Python int", "8.0"),
    bad("list", lambda: encode([[1, 2]]), TYPE, "tokens must be a JAX or NumPy array", "jnp.asarray"),
    bad("tensor", lambda: encode(torch.ones(2, 4)), TYPE, "tokens must be", "torch tensor", "to_jax"),
    bad("float-tokens", lambda: encode(TOKENS / 2), TYPE, "tokens must be integer", "float64"),
    bad("one-text", lambda: encode(TOKENS[0]), VALUE, "tokens must have rank 2", r"int32\[4\]", r"tokens\[None\]"),
    bad("empty", lambda: encode(TOKENS[:, :0]), VALUE, "length from 1 to max_length, 6", r"int32\[2, 0\]"),
    bad(
        "too-long",
        encode,
        VALUE,
        "length from 1 to max_length, 6",
        r"int32\[2, 7\]",
        argument=np.ones((2, 7), np.int32),
    ),
    bad("valid-shape", lambda: encode(TOKENS, VALID[:, :3]), VALUE, r"valid must .*\[2, 4\]", r"got bool\[2, 3\]"),
    bad("valid-batch", lambda: encode(TOKENS, VALID[:1]), VALUE, r"valid must .*\[2, 4\]", r"got bool\[1, 4\]"),
    bad("valid-float", lambda: encode(TOKENS, VALID * 1.0), TYPE, "valid must be bool or integer", "float64"),
    bad("types-shape", lambda: encode(TOKENS, None, TOKENS[:, :1]), VALUE, "token_types must", r"got int32\[2, 1\]"),
    bad("implementation", lambda: encode(implementation="flash"), VALUE, "implementation must be one of", "'flash'"),
    bad("pool-rank", lambda: mean_pool(HIDDEN[0], VALID), VALUE, "hidden must have rank 3", r"float32\[4, 8\]"),
    bad("pool-valid", lambda: mean_pool(HIDDEN, VALID[:, :2]), VALUE, r"valid must .*\[2, 4\]", r"got bool\[2, 2\]"),
]

test_folder = refusals(FOLDERS)
test_source = refusals(SOURCES)
test_decoder = refusals(DECODERS)
test_fitting = refusals(FITTING)
test_encoder = refusals(ENCODERS)
