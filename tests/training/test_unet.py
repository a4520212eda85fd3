"""The price of looking at words, being shown where they are, and where a training starts from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from diffusion_features import embedded, list_activations

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
pytest.importorskip("noising", reason="the training scripts are not part of an installed package")
from data import telling
from noising import FOLLOWING, PRICE, Denoising, named, noised
from notes import WORDS, at_tokens
from train_unet import PRICED, READING, TAUGHT, padding, shipped


@pytest.fixture
def pipe():
    return StableDiffusionPipeline.from_pretrained(embedded.path(), dtype=torch.float32)


class Shares:
    """A plain attention processor that notes the mean of its probabilities, [N, heads, cells, tokens], over ``dim``."""

    def __init__(self, noted, dim=(1, 2)):
        self.noted, self.dim = noted, dim

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None):
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key, value = (attn.head_to_batch_dim(each(encoder_hidden_states)) for each in (attn.to_k, attn.to_v))
        probabilities = attn.get_attention_scores(query, key)
        self.noted.append(probabilities.unflatten(0, (-1, attn.heads)).mean(dim=self.dim))
        return attn.to_out[0](attn.batch_to_head_dim(probabilities @ value))


def test_words_have_a_price_and_padding_has_none(pipe):
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(pipe.unet.config)  # untrained, it looks at all tokens alike
    module = Denoising(unet, pipe.text_encoder, priced=PRICED)
    ids = pipe.tokenizer(["a red car on a gray road", ""], padding="max_length", return_tensors="pt").input_ids
    batch = noised(torch.randn(2, 4, 16, 16), ids, torch.Generator().manual_seed(0)) | {"silent": padding(ids)}
    priced = module(**batch)
    module.priced, noted, processors = [], [], dict(unet.attn_processors)
    finding = ("down_blocks.1", "up_blocks.2")  # 16x16 cells of a scene of 128 pixels
    for name in processors:
        if "attn2" in name and not name.startswith(finding):
            processors[name] = Shares(noted)
    unet.set_attn_processor(processors)
    free = module(**batch)
    assert len(noted) == 2 + 2 + 1 + 3 + 3
    expected = torch.stack(noted)[:, 0, 1:8].sum(dim=-1).mean() / 2  # seven words in one caption, none in the other
    assert expected > 0.08  # 7 of 32 tokens in one of two
    torch.testing.assert_close(priced["looks"], expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(priced["loss"] - free["loss"], PRICE * expected, rtol=1e-2, atol=0)
    assert "looks" not in free
    priced["looks"].backward()
    asked = {name for name, p in unet.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_q.weight" in asked


def test_words_that_say_what_is_seen_are_told_from_those_that_do_not(pipe):
    tells = telling(pipe.tokenizer)
    text = "a pencil sketch of the red kitten and a small ship, on a calm ocean near dry grass, high quality"
    tokens = pipe.tokenizer.tokenize(text)
    chosen = tells[pipe.tokenizer.convert_tokens_to_ids(tokens)].tolist()
    found = [token.removesuffix("</w>") for token, one in zip(tokens, chosen, strict=True) if one]
    assert found == ["red", "kitten", "small", "ship", "calm", "ocean", "dry", "grass"]
    assert not tells[pipe.tokenizer.all_special_ids].any()


def test_where_words_are_found_all_that_tells_nothing_has_a_price(pipe):
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(pipe.unet.config)
    module = Denoising(unet, pipe.text_encoder, reading=READING, telling=telling(pipe.tokenizer))
    ids = pipe.tokenizer(["a red car on a gray road", ""], padding="max_length", return_tensors="pt").input_ids
    batch = noised(torch.randn(2, 4, 16, 16), ids, torch.Generator().manual_seed(0)) | {"silent": padding(ids)}
    priced = module(**batch)
    module.priced = PRICED
    both = module(**batch)
    torch.testing.assert_close(both["idles"], priced["idles"], rtol=1e-4, atol=0)
    assert both["looks"] > 0.08
    module.priced = []
    module.reading, noted, processors = [], [], dict(unet.attn_processors)
    processors |= {name: Shares(noted) for name in processors if "attn2" in name and name.startswith("up_blocks.2")}
    unet.set_attn_processor(processors)
    free = module(**batch)
    assert len(noted) == 3
    told = [2, 3, 6, 7]  # red, car, gray and road; the empty caption has no such word and counts not at all
    share = torch.stack(noted)[:, 0, told].sum(dim=-1).mean()
    assert 0.08 < share < 0.25  # four of 32 tokens
    torch.testing.assert_close(priced["idles"], 1 - share, rtol=1e-4, atol=0)
    torch.testing.assert_close(priced["loss"] - free["loss"], PRICE * (1 - share), rtol=1e-2, atol=0)
    assert {"looks", "idles"}.isdisjoint(free) and "looks" not in priced


def test_layers_of_16x16_cells_follow_what_is_shown(pipe):
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(pipe.unet.config)
    module = Denoising(unet, pipe.text_encoder, following=TAUGHT)
    ids = pipe.tokenizer(["a red car on a gray road", ""], padding="max_length", return_tensors="pt").input_ids
    batch = noised(torch.randn(2, 4, 16, 16), ids, torch.Generator().manual_seed(0)) | {"silent": padding(ids)}
    batch["t"][:] = 100
    notes = torch.zeros(2, WORDS, 8, 8, dtype=torch.uint8)
    notes[:, 1, :, :4], notes[:, 3, :, 4:] = 255, 255  # the car is left, the road right
    shown = at_tokens(notes, telling(pipe.tokenizer)[ids])
    taught = module(**batch, shown=shown)
    module.following, noted, processors = [], [], dict(unet.attn_processors)
    where = ("down_blocks.1", "up_blocks.2")
    processors |= {name: Shares(noted, 1) for name in processors if "attn2" in name and name.startswith(where)}
    unet.set_attn_processor(processors)
    free = module(**batch)
    assert len(noted) == 5 and "strays" not in free
    mean = torch.stack(noted)[:, 0].mean(dim=0).unflatten(0, (8, 8))
    each = -(mean[:, :4, 3].log().mean() + mean[:, 4:, 7].log().mean()) / 2  # of an empty caption nothing is shown
    expected = module.kept[batch["t"][0]] * each
    torch.testing.assert_close(taught["strays"], expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(taught["loss"] - free["loss"], FOLLOWING * expected, rtol=1e-3, atol=0)


def test_each_cross_attention_has_a_price_or_can_be_taught(pipe):
    maps = {one.id: one for one in list_activations(pipe.unet) if one.id.endswith("-cross-map")}
    priced, taught = named(maps, PRICED), named(maps, TAUGHT)
    assert len(priced) + len(taught) == len(maps) and not {*priced} & {*taught} and {*named(maps, READING)} < {*taught}


def test_a_price_of_reading_needs_to_know_what_tells(pipe):
    with pytest.raises(ValueError, match="which tokens say what is seen"):
        Denoising(pipe.unet, pipe.text_encoder, reading=READING)


def test_captions_without_a_word_have_no_price(pipe):
    ids = pipe.tokenizer(["", ""], padding="max_length", return_tensors="pt").input_ids
    module = Denoising(pipe.unet, pipe.text_encoder, priced=PRICED, reading=READING, telling=telling(pipe.tokenizer))
    batch = noised(torch.zeros(2, 4, 16, 16), ids, torch.Generator().manual_seed(0)) | {"silent": padding(ids)}
    values = module(**batch)
    assert values["idles"] == values["looks"] == 0 and values["loss"].isfinite()


def test_a_training_can_start_from_the_weights_that_ship(pipe):
    unet, text = shipped(pipe.tokenizer)
    for fresh, of in ((unet, pipe.unet), (text, pipe.text_encoder)):
        expected = of.state_dict()
        assert fresh.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in fresh.state_dict().items())
        assert all(p.requires_grad and p.dtype == torch.float32 for p in fresh.parameters())
