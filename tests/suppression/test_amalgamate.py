"""Amalgamation against the formulas, written out; variants against separate calls; the shift's number by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion_features import FeatureExtractor
from diffusion_features.suppression import ControlNet, FineGrainedPrompt, LoRA, variants
from diffusion_features.suppression.amalgamate import WeightAssigner, assigner_loss, averaged, concatenated
from diffusion_features.suppression.conditions import canny
from diffusion_features.suppression.once import once, remembering
from diffusion_features.suppression.shift import edge_agreement, edges, label_edges, shift_sheet
from tests.suppression.models import UNET_IDS, control, extractor, photo, save_lora
from tests.tiny import save_sd15


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- variants -------------------------------------------------------------------------------------------------------


def test_variants_equal_calls_of_their_own_and_share_what_is_equal(tmp_path: Path) -> None:
    fx = extractor("unet")
    calls = {"vae": 0, "text": 0}

    def count(name: str) -> None:
        calls[name] += 1

    techniques = {
        "base": [],
        "canny": [ControlNet(control(fx))],
        "weights": [LoRA(save_lora(fx, tmp_path))],
        "words": FineGrainedPrompt("{prompt}, the red"),
    }
    expected = {name: fx(photo(), "a cat", t=80, seed=3, suppress=s) for name, s in techniques.items()}
    fx.pipe.vae.encoder.register_forward_hook(lambda *_: count("vae"))
    fx.pipe.text_encoder.register_forward_hook(lambda *_: count("text"))
    found = variants(fx, photo(), techniques, "a cat", t=80, seed=3)
    assert calls == {"vae": 1, "text": 2}  # "a cat", and the finer prompt
    for name, features in expected.items():
        for id, feature in features.items():
            torch.testing.assert_close(found[name][id], feature)
    assert fx._prompts == fx._recent == {}


def test_variants_describe_and_condition_each_image_once() -> None:
    fx = extractor("sd3")
    net, made = control(fx), {"captions": 0, "conditions": 0, "vae": 0}

    def captioner(images: list[Image.Image]) -> list[str]:
        made["captions"] += 1
        return ["the red"]

    def edges(images: Tensor) -> Tensor:
        made["conditions"] += 1
        return canny(images)

    words, strong = FineGrainedPrompt("{caption}", captioner), ControlNet(net, edges)
    sets = {"words": words, "strong": strong, "both": [ControlNet(net, edges, 0.5), words]}
    expected = {name: fx(photo(), suppress=s) for name, s in sets.items()}
    fx.pipe.vae.encoder.register_forward_hook(lambda *_: made.__setitem__("vae", made["vae"] + 1))
    made |= dict.fromkeys(made, 0)
    found = variants(fx, photo(), sets)
    assert made == {"captions": 1, "conditions": 1, "vae": 2}  # of the image, and of the condition
    for name, features in expected.items():
        for id, feature in features.items():
            torch.testing.assert_close(found[name][id], feature)


def test_what_is_made_once_is_made_of_the_same_images_alone() -> None:
    a, b = random(1, 3, 4, 4), random(1, 3, 4, 4, seed=1)
    assert once(a, "key", lambda: 1) == 1 and once(a, "key", lambda: 2) == 2
    with remembering():
        assert once(a, "key", lambda: 1) == 1 and once(a.clone(), "key", lambda: 2) == 1
        assert once(b, "key", lambda: 3) == 3 and once(a, "other", lambda: 4) == 4
        with remembering():
            assert once(a, "key", lambda: 5) == 1
    assert once(a, "key", lambda: 6) == 6


def test_variants_encode_again_under_a_lora_of_the_text_encoder(tmp_path: Path) -> None:
    fx = FeatureExtractor.from_pretrained(save_sd15(tmp_path / "sd"), UNET_IDS, dtype=torch.float32, device="cpu")
    techniques = {"base": [], "lora": [LoRA(save_lora(fx, tmp_path, text=True))]}
    found = variants(fx, photo(), techniques, "a cat")
    for name, suppress in techniques.items():
        expected = fx(photo(), "a cat", suppress=suppress)
        for id, feature in expected.items():
            torch.testing.assert_close(found[name][id], feature)


# ---- amalgamation ---------------------------------------------------------------------------------------------------


def test_side_by_side_and_mean() -> None:
    variants_ = [{"a": random(2, 3, 4, 5, seed=s), "b": random(2, 1, 2, 2, seed=s)} for s in range(3)]
    joined, mean = concatenated(variants_), averaged(variants_)
    assert joined["a"].shape == (2, 9, 4, 5) and torch.equal(joined["a"][:, 3:6], variants_[1]["a"])
    torch.testing.assert_close(mean["b"], (variants_[0]["b"] + variants_[1]["b"] + variants_[2]["b"]) / 3)
    with pytest.raises(ValueError, match="not all of them have b"):
        concatenated([variants_[0], {"a": variants_[1]["a"]}])
    with pytest.raises(ValueError, match="variants of a have different shapes"):
        averaged([{"a": random(1, 2, 3, 3)}, {"a": random(1, 2, 3, 4)}])
    with pytest.raises(ValueError, match="no variants"):
        averaged([])


@pytest.mark.parametrize("per_cell", [False, True])
def test_the_mixture_is_the_formula(per_cell: bool) -> None:
    torch.manual_seed(0)
    module = WeightAssigner(4, assigners=2, hidden=8, per_cell=per_cell).eval().double()
    r = [random(2, 4, 3, 5, seed=s).double() for s in range(3)]
    mixed, weights = module(r)
    assert mixed.shape == (2, 8, 3, 5)
    assert weights.shape == ((2, 2, 3, 4, 3, 5) if per_cell else (2, 2, 3, 4, 1, 1))
    torch.testing.assert_close(weights.sum(2), torch.ones_like(weights.sum(2)))
    for j in range(2):
        logits = torch.stack([module.assigners[j](x) for x in r])
        shares = logits.exp() / logits.exp().sum(0)
        expected = sum(shares[i] * r[i] for i in range(3))
        torch.testing.assert_close(mixed[:, 4 * j : 4 * (j + 1)], expected)


def test_rows_of_pixels_are_mixed_as_cells_are() -> None:
    torch.manual_seed(0)
    module = WeightAssigner(4, assigners=2, hidden=8, per_cell=True).eval()
    grids = [random(1, 4, 3, 5, seed=s) for s in range(2)]
    rows, _ = module([g[0].flatten(1).T for g in grids])
    torch.testing.assert_close(rows, module(grids)[0][0].flatten(1).T)
    with pytest.raises(ValueError, match="same shape"):
        WeightAssigner(4)([grids[0], grids[1][..., :2]])
    with pytest.raises(ValueError, match=r"\(B, 4, h, w\), not"):
        WeightAssigner(4)([g[0].flatten(1).T for g in grids])


def test_the_loss_is_the_published_one() -> None:
    weights = random(2, 3, 4, 5, 1, 1).softmax(2)  # B=2, n=3, b=4, C=5
    total = 0.0
    for image in range(2):
        for channel in range(5):
            w = [[weights[image, j, i, channel, 0, 0].item() for i in range(4)] for j in range(3)]
            total -= 0.3 * sum(math.hypot(*x) for x in w)
            total -= 0.7 / 2 * sum(math.dist(w[j], w[k]) for j in range(3) for k in range(3) if j != k)
    assert assigner_loss(weights, 0.3, 0.7).item() == pytest.approx(total / 10, rel=1e-5)


def test_the_losses_pull_where_they_should_even_from_equal_assigners() -> None:
    def trained(sparsity: float, diversity: float) -> Tensor:
        logits = torch.zeros(1, 2, 3, 1, 1, 1)
        logits[0, :, 0] = 0.1
        logits[0, 1, 1] = 0.05
        logits.requires_grad_()
        optimizer = torch.optim.SGD([logits], lr=1.0)
        for _ in range(100):
            optimizer.zero_grad()
            assigner_loss(logits.softmax(2), sparsity, diversity).backward()
            optimizer.step()
        return logits.detach().softmax(2)[0, :, :, 0, 0, 0]

    assert (trained(1.0, 0.0).amax(1) > 0.95).all()  # one variant has it all
    apart = trained(0.0, 1.0)
    assert (apart[0] - apart[1]).norm() > 1.0
    same = torch.full((1, 2, 3, 1, 1, 1), 1 / 3, requires_grad=True)
    assigner_loss(same, 1.0, 1.0).backward()
    assert same.grad is not None and torch.isfinite(same.grad).all()


def test_the_assigner_learns_which_variant_is_the_signal() -> None:
    torch.manual_seed(0)
    module = WeightAssigner(4, assigners=1, hidden=16, dropout=0.0)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for step in range(60):
        target = random(8, 4, 4, 4, seed=step)
        noise = 3 + random(8, 4, 4, 4, seed=1000 + step)
        mixed, _ = module([noise, target])
        loss = (mixed - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert module.weights([noise, target])[:, :, 1].mean() > 0.95


# ---- content shift --------------------------------------------------------------------------------------------------


def test_edge_agreement_by_hand() -> None:
    labels = torch.zeros(8, 8, dtype=torch.long)
    labels[:, 4:] = 1
    assert label_edges(labels, (4, 4)).tolist() == [[False, True, True, False]] * 4
    step = torch.zeros(2, 4, 4)
    step[:, :, 2:] = 1.0  # its gradient is 0.5 in columns 1 and 2, in each of two channels
    assert edges(step)[0].tolist() == pytest.approx([0.0, math.sqrt(0.5), math.sqrt(0.5), 0.0])
    assert edge_agreement(step, labels) == 1.0
    assert edge_agreement(torch.ones(2, 4, 4), labels) == 0.5
    ramp = torch.arange(4.0).square()[None, None].expand(1, 4, 4)  # gradients 1, 2, 4, 5
    # of 4 pairs of columns, (1, 0) and (2, 0) are won, (1, 3) and (2, 3) lost
    assert edge_agreement(ramp, labels) == 0.5
    with pytest.raises(ValueError, match="nothing to tell apart"):
        edge_agreement(step, torch.zeros(8, 8, dtype=torch.long))


def test_agreement_is_the_share_of_pairs_that_are_in_order() -> None:
    labels = (random(16, 24, seed=1) > 1.2).long()
    feature = random(5, 8, 12, seed=2).round()  # with ties
    strength, there = edges(feature).flatten().tolist(), label_edges(labels, (8, 12)).flatten().tolist()
    pairs = [
        (a > b) + 0.5 * (a == b)
        for a, x in zip(strength, there, strict=True) if x
        for b, y in zip(strength, there, strict=True) if not y
    ]  # fmt: skip
    assert edge_agreement(feature, labels) == pytest.approx(sum(pairs) / len(pairs))


def test_the_sheet_has_a_tile_for_each_timestep() -> None:
    labels = torch.zeros(32, 64, dtype=torch.long)
    labels[:, 32:] = 1
    rows = {name: {t: random(6, 4, 8, seed=t) for t in (0, 500)} for name in ("none", "canny")}
    made = shift_sheet(Image.new("RGB", (64, 32)), rows, labels)
    assert made.width > 3 * 160 and made.height > 2 * 80
