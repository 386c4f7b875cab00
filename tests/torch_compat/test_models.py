"""Weights of Transformers in models of ours: from an object, a folder, in shards, in bfloat16, tied."""

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, BertModel

from jaxmask import checks
from tests.flax.test_images import make
from tests.helpers.tiny import tiny_llama
from torch_compat import models

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def bert() -> BertModel:
    return BertModel(BertConfig(**SIZES)).eval()


def weights(model: Any) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in flat}


def same(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, weights(one), weights(other))


def test_weights_are_as_they_are(bert: BertModel) -> None:
    found, state = weights(models.load(bert)), bert.state_dict()
    np.testing.assert_array_equal(found["layers.1.up.weight"], state["encoder.layer.1.intermediate.dense.weight"])
    np.testing.assert_array_equal(found["layers.0.down.bias"], state["encoder.layer.0.output.dense.bias"])
    np.testing.assert_array_equal(found["words.embedding"], state["embeddings.word_embeddings.weight"])
    np.testing.assert_array_equal(found["norm.scale"], state["embeddings.LayerNorm.weight"])


def test_weights_do_not_change_with_those_of_the_source(bert: BertModel) -> None:
    source = copy.deepcopy(bert)
    found = models.load(source)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.zero_()
    same(found, models.load(bert))


def test_weights_are_free_to_move_to_other_devices(bert: BertModel) -> None:
    """Committed arrays would compile a step again once its outputs are its inputs."""
    assert not any(leaf.committed for leaf in jax.tree.leaves(nnx.split(models.load(bert))[1]))


def test_a_folder_has_the_weights_of_the_model_saved_to_it(bert: BertModel, tmp_path: Path) -> None:
    bert.save_pretrained(tmp_path)
    same(models.load(tmp_path), models.load(bert))
    same(models.load(str(tmp_path)), models.load(bert))


def test_a_folder_in_shards_has_the_weights_of_the_model(bert: BertModel, tmp_path: Path) -> None:
    bert.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    same(models.load(tmp_path), models.load(bert))


def test_weights_in_bfloat16_are_read_and_kept_where_asked(bert: BertModel, tmp_path: Path) -> None:
    half: Any = BertModel(bert.config).bfloat16()
    half.save_pretrained(tmp_path)
    kept, widened = models.load(tmp_path, dtype=jnp.bfloat16), models.load(tmp_path)
    tokens = np.array([[1, 2, 3]])
    assert kept(tokens).dtype == jnp.bfloat16
    assert widened(tokens).dtype == jnp.float32
    same(widened, models.load(half.float()))
    for name, found in weights(kept).items():
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found.astype(np.float32), weights(widened)[name])


def test_a_head_of_pretraining_is_left_out(bert: BertModel, tmp_path: Path) -> None:
    under_a_head = BertForMaskedLM(bert.config)
    under_a_head.bert.load_state_dict(bert.state_dict(), strict=False)
    same(models.load(under_a_head), models.load(bert))


def test_the_oldest_names_of_norms_are_read(bert: BertModel, tmp_path: Path) -> None:
    bert.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {"weight": "gamma", "bias": "beta"}
    renamed = {
        f"{name.rpartition('.')[0]}.{old[name.rpartition('.')[2]]}" if "LayerNorm" in name else name: tensor.clone()
        for name, tensor in load_file(file).items()
    }
    save_file(renamed, file)
    same(models.load(tmp_path), models.load(bert))


def test_no_random_weights_are_made(bert: BertModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> Any:
        # Tracing is fine, for it makes nothing.
        assert all(map(checks.is_traced, jax.tree.leaves(arguments[:1])))
        return normal(*arguments, **named)

    normal = jax.random.normal
    monkeypatch.setattr(jax.random, "normal", refuse)
    models.load(bert)


def write_gguf(path: Path, model: Any, leave_out: str = "", add: str = "", scaling: str = "none") -> None:
    """The weights of a Llama under the names of llama.cpp, but for one tensor."""
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
    }
    config, writer = model.config, GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_string("llama.rope.scaling.type", scaling)
    if add:
        writer.add_tensor(add, np.ones(4, np.float32))
    for name, weight in model.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        if name != leave_out:
            writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_has_the_logits_of_transformers(tmp_path: Path) -> None:
    tokens = np.array([[1, 2, 3, 4]])
    write_gguf(tmp_path / "a.gguf", tiny_llama())
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf")
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens)).logits
    np.testing.assert_allclose(models.load(tmp_path, gguf_file="a.gguf")(tokens)[0], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"leave_out": "blk.0.ffn_up.weight"}, r"a.gguf do not fit .*missing_keys.*layers.0.mlp.up_proj.weight"),
        ({"add": "rope_freqs.weight"}, r"a.gguf do not fit .*left_over.*rope_freqs.weight"),
        ({"scaling": "linear"}, r"rope.scaling.type of a.gguf must be 'none'.*got 'linear'"),
    ],
)
def test_a_gguf_file_is_refused_where_transformers_would_not_say_a_word(
    changed: dict[str, str], problem: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "a.gguf", tiny_llama(), **changed)
    with pytest.raises(ValueError, match=problem):
        models.load(tmp_path, gguf_file="a.gguf")


def test_frequencies_of_old_checkpoints_are_left_out() -> None:
    model = tiny_llama()
    old = model.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    same(models.assemble(models.ARCHITECTURES["llama"], model.config, old), models.load(model))


@pytest.mark.parametrize("text", ["model.language_model.", "language_model.model."])
def test_a_model_with_images_has_the_weights_of_its_text_model_by_either_name(text: str) -> None:
    theirs = make("PaliGemma 2")
    language_model = theirs.model.language_model.state_dict()
    renamed = {f"{text}{name}": tensor for name, tensor in language_model.items()}
    unused = {"vision_tower.a": torch.ones(1), "model.multi_modal_projector.b": torch.ones(1)}
    found = models.assemble(models.ARCHITECTURES["paligemma"], theirs.config, renamed | unused)
    same(found, models.load(theirs))


def test_one_file_goes_before_shards(bert: BertModel, tmp_path: Path) -> None:
    bert.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    same(models.load(tmp_path), models.load(bert))


class Tied(nnx.Module):
    """One matrix, in and out."""

    def __init__(self, size: int, *, param_dtype: Any, rngs: nnx.Rngs) -> None:
        self.words = nnx.Embed(size, 3, param_dtype=param_dtype, rngs=rngs)


TIED = models.Architecture(
    lambda config: (Tied, config.vocab_size),
    lambda size: models.embedding("embed", "words"),
    ties={"lm_head.weight": "embed.weight"},
)
MATRIX = torch.arange(12.0).reshape(4, 3)
FOUR: Any = BertConfig(vocab_size=4)


@pytest.mark.parametrize("head", [{}, {"lm_head.weight": MATRIX}, {"lm_head.weight": MATRIX.clone()}])
def test_a_tied_weight_may_be_absent_or_the_same(head: dict[str, torch.Tensor]) -> None:
    model = models.assemble(TIED, FOUR, {"embed.weight": MATRIX, **head})
    np.testing.assert_array_equal(model.words.embedding[...], MATRIX)
