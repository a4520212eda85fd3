"""The transformer's training: words, and that padding plays no part."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import PixArtAlphaPipeline

from diffusion_features import capture, embedded

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
from noising import PRICE, noised
from train_dit import CONTEXT, SIZES, TOKENS, Masked, Size, networks, shipped, text_encoder, tokenizer

DISTANCES = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


@pytest.fixture(scope="module")
def words():
    return tokenizer({"a", "red", "car", "sailboat", "on", "sand"})


def test_each_word_is_one_token_and_any_other_text_is_spelt(words):
    text = "a red sailboat, carpet on sand"
    coded = words(text, return_offsets_mapping=True)
    pieces = [text[a:b] for a, b in coded["offset_mapping"][:-1]]
    assert pieces == ["a", "red", "sailboat", ",", "car", "p", "e", "t", "on", "sand"]
    assert words.eos_token_id == coded["input_ids"][-1]
    assert words.pad_token_id == 0  # what the mask of the training takes for padding


def test_padding_changes_no_prediction(words):
    torch.manual_seed(0)
    module = Masked(*networks(Size(layers=2, heads=2, rate=0.0), len(words))).eval()
    # A fresh transformer's last layer predicts nothing, whatever it is told.
    torch.nn.init.normal_(module.unet.proj_out.weight)
    noisy, t = torch.randn(2, 4, 8, 12), torch.tensor([100, 700])

    def predict(text: list[str], length: int) -> torch.Tensor:
        ids = words(text, padding="max_length", max_length=length, return_tensors="pt").input_ids
        with torch.no_grad():
            return module.predict(noisy, t, module.read(ids), ids)

    short = predict(["a red car", "sand"], TOKENS)
    torch.testing.assert_close(short, predict(["a red car", "sand"], CONTEXT), rtol=1e-4, atol=1e-5)
    assert (short - predict(["a red sailboat", "sand"], TOKENS))[0].abs().max() > 1e-4


def test_sizes_differ_in_depth_and_width():
    small, large = (networks(SIZES[name], 100)[0] for name in ("dit-small", "dit"))
    parameters = [sum(p.numel() for p in each.parameters()) for each in (small, large)]
    assert parameters[1] > 4 * parameters[0]
    assert small.config.sample_size == large.config.sample_size


def taught(encoder):
    """The encoder with a last projection that adds something, as training makes it: fresh, it adds nothing."""
    torch.manual_seed(0)
    for layer, name in zip(encoder.encoder.block[0].layer, ("SelfAttention.o", "DenseReluDense.wo"), strict=True):
        torch.nn.init.normal_(layer.get_submodule(name).weight)
    return encoder


def test_each_word_says_itself_and_what_is_just_before_it(words):
    module = Masked(*networks(Size(1, 2, 1e-3), len(words)))
    taught(module.text)
    texts = ["a red car on sand", "red car sand a on", "a red sailboat car on sand"]
    ids = words(texts, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    first, second, third = module.read(ids)
    torch.testing.assert_close(first[2], second[1])  # car after red, wherever
    assert (first[2] - third[3]).abs().max() > 0.1  # car after sailboat
    torch.testing.assert_close(first[3], third[4])  # on after car: what is before that does not matter
    torch.testing.assert_close(first[5], third[6])  # the end after sand
    assert not torch.allclose(first[5], second[5])  # the end after on


def test_words_read_the_same_in_half_precision(words):
    encoder = taught(text_encoder(len(words)))
    ids = words(["a red car on sand", "a"], padding=True, return_tensors="pt").input_ids
    exact = encoder(ids, attention_mask=(ids > 0).long()).last_hidden_state
    half = encoder.half()(ids, attention_mask=(ids > 0).long()).last_hidden_state
    assert dict(encoder.named_parameters())[DISTANCES].isfinite().all()
    torch.testing.assert_close(half[ids > 0].float(), exact[ids > 0], rtol=0.02, atol=0.02)


def test_a_fresh_encoder_adds_nothing_to_a_word(words):
    encoder = text_encoder(len(words))
    ids = words(["red car", "sand car"], return_tensors="pt").input_ids
    (_, one, _), (_, other, _) = encoder(ids).last_hidden_state
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", SIZES)
def test_words_have_a_price_and_neither_the_end_nor_padding_has_one(words, name):
    torch.manual_seed(0)
    module = Masked(*networks(SIZES[name], len(words)))
    ids = words(["a red car on sand", ""], padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    batch = noised(torch.randn(2, 4, 8, 8), ids, torch.Generator().manual_seed(0))
    free = module(**batch)
    module.priced = SIZES[name].priced
    priced = module(**batch)
    kept = module.kept[batch["t"]].view(-1, 1, 1, 1)
    noisy = kept.sqrt() * batch["latents"] + (1 - kept).sqrt() * batch["noise"]
    with torch.no_grad(), capture(module.unet, SIZES[name].priced) as maps:
        module.predict(noisy, batch["t"], module.read(ids), ids)
    # five words before the end token in one caption, none in the other
    shares = [tensor[0, ..., :5].sum(dim=-1).mean() / 2 for tensor in maps.values()]
    assert len(shares) == len(SIZES[name].priced) and min(shares) > 0.1
    torch.testing.assert_close(priced["looks"], sum(shares) / len(shares), rtol=1e-4, atol=0)
    torch.testing.assert_close(priced["loss"] - free["loss"], PRICE * priced["looks"], rtol=1e-2, atol=1e-6)
    assert "looks" not in free


@pytest.mark.parametrize("name", SIZES)
def test_a_training_can_start_from_the_weights_that_ship(name):
    pipe = PixArtAlphaPipeline.from_pretrained(embedded.path(f"embedded-{name}"), dtype=torch.float32)
    transformer, text = shipped(name, len(pipe.tokenizer))
    for fresh, of in ((transformer, pipe.transformer), (text, pipe.text_encoder)):
        expected = of.state_dict()
        assert fresh.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in fresh.state_dict().items())
        assert all(p.dtype == torch.float32 for p in fresh.parameters())
        fixed = [key for key, p in fresh.named_parameters() if not p.requires_grad]
        assert fixed == ([DISTANCES] if fresh is text else [])


@pytest.mark.parametrize("name", SIZES)
def test_the_losses_are_the_same_in_mixed_precision(words, name):
    torch.manual_seed(0)
    module = Masked(*networks(SIZES[name], len(words)), priced=SIZES[name].priced, following=SIZES[name].following)
    taught(module.text)
    torch.nn.init.normal_(module.unet.proj_out.weight, std=0.02)
    ids = words(["a red car on sand", "a"], padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    shown = torch.rand(2, 16, TOKENS).softmax(dim=2)
    batch = noised(torch.randn(2, 4, 8, 8), ids, torch.Generator().manual_seed(0)) | {"shown": shown}
    exact = module(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = module(**batch)
    assert exact.keys() == half.keys() == {"loss", "plain", "looks", "strays"}
    for key, value in exact.items():
        torch.testing.assert_close(half[key].float(), value, rtol=0.03, atol=0.0, msg=key)
    half["loss"].backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)
