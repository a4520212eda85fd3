"""The share of cross-attention that falls on words, and its price."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from diffusion_features import FeatureExtractor, embedded

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
pytest.importorskip("looking", reason="the training scripts are not part of an installed package")
from looking import watch
from noising import PRICE, Denoising, noised
from train_unet import FINDING, padding, shipped


@pytest.fixture
def pipe():
    return StableDiffusionPipeline.from_pretrained(embedded.path(), dtype=torch.float32)


def coded(pipe, *captions):
    return pipe.tokenizer(list(captions), padding="max_length", return_tensors="pt").input_ids


def test_shares_are_those_of_the_attention_maps(pipe):
    """Against the maps that the extractor captures of the same call."""
    fx = FeatureExtractor(pipe, "down-level2-repeat1-vit-block0-cross-map", model_id="embedded")
    scene = embedded.render(20_000_007)
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    (probabilities,) = fx(scene.image, "a red car", t=300).values()
    hook.remove()
    ((args, kwargs),) = calls
    with torch.no_grad():
        before = pipe.unet(*args, **kwargs)[0]
        watched = watch(pipe.unet, but=["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks"])
        after = pipe.unet(*args, **kwargs)[0]
    assert len(watched) == 2
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(watched[1].take(), probabilities.mean(dim=(1, 2)), rtol=1e-4, atol=1e-6)
    with pytest.raises(AssertionError):
        watched[1].take()


def test_words_have_a_price_and_padding_has_none(pipe):
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(pipe.unet.config)  # untrained, it looks at all tokens alike
    watched = watch(unet, but=FINDING)
    module = Denoising(unet, pipe.text_encoder, watched=watched)
    ids = coded(pipe, "a red car on a gray road", "")
    batch = noised(torch.randn(2, 4, 16, 16), ids, torch.Generator().manual_seed(0)) | {"silent": padding(ids)}
    priced = module(**batch)
    module.watched = ()
    free = module(**batch)
    shares = torch.stack([one.take() for one in watched])
    by_hand = shares[:, 0, 1:8].sum(dim=-1).mean() / 2  # seven words in the first caption, none in the second
    assert by_hand > 0.08  # 7 of 32 tokens in one of two
    torch.testing.assert_close(priced["looks"], by_hand)
    torch.testing.assert_close(priced["loss"] - free["loss"], PRICE * by_hand, rtol=1e-2, atol=0)
    assert "looks" not in free
    priced["looks"].backward()
    asked = {name for name, p in unet.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_q.weight" in asked


def test_a_training_can_start_from_the_weights_that_ship(pipe):
    unet, text = shipped(pipe.tokenizer)
    for fresh, of in ((unet, pipe.unet), (text, pipe.text_encoder)):
        expected = of.state_dict()
        assert fresh.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in fresh.state_dict().items())
        assert all(p.requires_grad and p.dtype == torch.float32 for p in fresh.parameters())
