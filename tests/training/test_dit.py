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
from train_dit import CONTEXT, SIZES, TOKENS, Masked, Size, networks, shipped, tokenizer


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


def test_each_word_says_itself_alone(words):
    module = Masked(*networks(Size(1, 2, 1e-3), len(words)))
    ids = words(["a red car", "sand on red"], padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    one, other = module.read(ids)
    assert torch.equal(one[1], other[2]) and not torch.equal(one[0], other[0])
    assert torch.equal(one[3], other[3]), "the end token is the same after any caption"


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
        assert all(p.requires_grad and p.dtype == torch.float32 for p in fresh.parameters())
