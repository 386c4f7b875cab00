"""A real model in Flax gives real sentences the embeddings that PyTorch gives them."""

from dataclasses import replace

from torch_compat import real_models


def test_minilm_in_flax_gives_the_embeddings_of_pytorch() -> None:
    result = real_models.compare_minilm()
    assert result.sentences == 64
    assert result.tokens[1] > 40 * result.tokens[0]
    assert result.lowest_cosine >= 0.999999
    assert result.largest_difference <= 1e-5
    assert result.agrees
    assert not replace(result, lowest_cosine=0.99999).agrees
    assert not replace(result, largest_difference=2e-5).agrees
    assert not replace(result, difference_without_mask=result.largest_difference).agrees
