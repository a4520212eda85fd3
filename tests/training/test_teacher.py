"""What two models together show a third: their maps, word by word, and the price of looking elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from diffusion_features import capture, embedded
from diffusion_features.images import as_tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
pytest.importorskip("noising", reason="the training scripts are not part of an installed package")
from data import Captioned, telling
from noising import FOLLOWING, astray, noised
from notes import WORDS, at_tokens, hidden, shown
from teacher import T, Teachers, stretched, told
from train_dit import SIZES, TOKENS, Masked, networks


@pytest.fixture(scope="module")
def teachers():
    return Teachers(torch.device("cpu"))


def test_words_that_tell_share_all_attention_in_their_order():
    maps = torch.rand(2, 3, 5, dtype=torch.float64)
    tells = torch.tensor([[False, True, False, True, False], [False, False, True, False, False]])
    found = told(maps, tells)
    assert found.shape == (2, 3, WORDS)
    torch.testing.assert_close(found[0, :, 0], maps[0, :, 1] / (maps[0, :, 1] + maps[0, :, 3]))
    torch.testing.assert_close(found[0, :, 1], maps[0, :, 3] / (maps[0, :, 1] + maps[0, :, 3]))
    torch.testing.assert_close(found[1, :, 0], torch.ones(3, dtype=torch.float64))
    assert not found[0, :, 2:].any() and not found[1, :, 1:].any()


def test_a_caption_with_more_words_than_are_noted_is_an_error():
    with pytest.raises(ValueError, match=f"{WORDS + 1} words of a caption tell what is seen: at most {WORDS} can"):
        told(torch.rand(1, 2, 40), torch.arange(40)[None] <= WORDS)


def test_each_word_is_stretched_over_the_cells():
    found = stretched(torch.tensor([[[0.2, 0.4], [0.6, 0.5], [1.0, 0.9]]]))
    torch.testing.assert_close(found, torch.tensor([[[0.0, 0.0], [0.5 / 0.7, 0.2 / 0.7], [0.5, 0.5]]]))


def test_notes_come_back_at_the_tokens_of_another_tokenizer():
    notes = torch.zeros(2, WORDS, 2, 3, dtype=torch.uint8)
    notes[0, 0], notes[0, 1], notes[1, 0] = 51, 204, 255
    tells = torch.tensor([[True, False, False, True], [False, False, False, False]])
    found = at_tokens(notes, tells)
    assert found.shape == (2, 6, 4)
    torch.testing.assert_close(found[0], torch.tensor([0.04, 0.0, 0.0, 0.64]).expand(6, 4) / 0.68)
    assert not found[1].any(), "of an empty caption nothing is shown, whatever was noted"


def test_nothing_noted_is_said(tmp_path):
    with pytest.raises(SystemExit, match=r"0 of 3 scenes are noted in .*: run training/teacher\.py to its end"):
        shown(3, tmp_path)
    for begin in (2, 0):
        torch.save({"shown": torch.arange(begin, begin + 2)}, tmp_path / f"{begin:05d}.pt")
    with pytest.raises(SystemExit, match="4 of 5 scenes"):
        shown(5, tmp_path)
    assert shown(4, tmp_path).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("start", "rest", "padding"), [([], 1, 0), ([3], 3, 1)], ids=["T5", "CLIP"])
def test_what_was_a_hidden_phrase_s_belongs_to_the_token_that_says_nothing(start, rest, padding):
    words = [*start, 5, 6, 7, 2, 8, 9, 1, padding]  # a red car, (2) blue sky, and the end; CLIP pads with that too
    share = {6: 0.1, 7: 0.2, 8: 0.3, 9: 0.4}
    given = torch.tensor(words).expand(400, -1)
    shown = torch.tensor([share.get(token, 0.0) for token in words]).expand(400, 3, -1)
    tells = torch.tensor([token in share for token in words]).expand(400, -1)
    ids, found = hidden(given, shown, tells, rest, padding, torch.Generator().manual_seed(0))
    seen = []
    for row, maps in zip(ids.tolist(), found, strict=True):
        gone = {*([] if 6 in row else [6, 7]), *([] if 8 in row else [8, 9])}
        seen.append(len(gone))
        kept = [token for token in words if token not in gone]
        assert row == kept + [padding] * len(gone), "a phrase is hidden as a whole, and the others stay in their order"
        expected = [sum(share[token] for token in gone) if token == rest else share.get(token, 0.0) for token in row]
        torch.testing.assert_close(maps, torch.tensor(expected).expand(3, -1))
    assert 200 < seen.count(0) < 320 and {*seen} == {0, 2, 4}


@pytest.fixture(scope="module")
def seen(teachers):
    """A scene, its latents, the same with the teachers' noise, and t."""
    scene = embedded.render(seed=20_000_007)
    x = teachers.sd.vae.encode(as_tensor(scene.image)).latent_dist.mode().detach()
    t = torch.tensor([T])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return scene, x, teachers.noise.add_noise(x, noise, t), t


def test_the_teachers_are_averaged(teachers, seen):
    _, x, noisy, t = seen
    captions = ["a photo of a small red car, dry grass and sky"]
    (found,) = teachers(x, captions, torch.Generator().manual_seed(0))
    with torch.no_grad():
        each = [one(noisy, t, captions)[0] for one in (teachers.unet, teachers.transformer)]
    torch.testing.assert_close(found.flatten(1).T, (each[0] + each[1]) / 2)
    assert (each[0] - each[1]).abs().max() > 0.1
    assert all(one[:, :6].amax(dim=0).all() and not one[:, 6:].any() for one in each), "small red car dry grass sky"
    torch.testing.assert_close(found.sum(dim=0), torch.ones(16, 16))


@pytest.mark.parametrize("which", ["unet", "transformer"])
def test_each_teacher_finds_what_is_named_in_its_order(teachers, seen, which):
    scene, _, noisy, t = seen
    with torch.no_grad():
        (found,) = getattr(teachers, which)(noisy, t, ["a photo of " + " and ".join(scene.classes)])
    best = found[:, : len(scene.classes)].argmax(dim=1).view(16, 16)
    best = best.repeat_interleave(8, dim=0).repeat_interleave(8, dim=1)
    right = torch.tensor([embedded.label(name) for name in scene.classes])[best] == torch.from_numpy(scene.semantic)
    assert right.float().mean() > 0.8


def test_a_draw_says_which_captions_it_took(teachers):
    captions = [["a red car", "sand"], ["sky", "a blue boat"], ["snow", "road"]]
    data = Captioned(torch.arange(3.0).view(3, 1, 1, 1).expand(3, 4, 2, 2), captions, teachers.dit.tokenizer, TOKENS)
    (rows, which), x, ids = data.draw(200, torch.Generator().manual_seed(0))
    assert torch.equal(x[:, 0, 0, 0], rows.float())
    empty = (ids == data.empty).all(dim=1)
    assert torch.equal(ids[~empty], data.ids[rows, which].long()[~empty]) and 5 < empty.sum() < 50
    assert len({*zip(rows.tolist(), which.tolist(), strict=True)}) == 6


def test_going_astray_is_a_divergence_where_something_is_shown():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.rand(2, 3, 6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    theirs = torch.rand(2, 6, 4, generator=generator, dtype=torch.float64)
    maps = {"a": one / one.sum(dim=3, keepdim=True), "b": other / other.sum(dim=3, keepdim=True), "c": torch.zeros(1)}
    theirs[..., 2] = 0
    theirs /= theirs.sum(dim=2, keepdim=True)
    theirs[1, :3] = 0  # three cells of which nothing is known
    mean = (maps["a"] + maps["b"]).sum(dim=1) / 6
    total, kept = 0.0, torch.tensor([0.9, 0.2], dtype=torch.float64)
    for n, cell in [(0, cell) for cell in range(6)] + [(1, cell) for cell in range(3, 6)]:
        each = sum(p * (p / q).log() for p, q in zip(theirs[n, cell], mean[n, cell], strict=True) if p > 0)
        total += kept[n] * each
    torch.testing.assert_close(astray(maps, ["a", "b"], theirs, kept), total / 9)
    assert astray(maps, ["a", "b"], torch.zeros_like(theirs), kept) == 0


@pytest.mark.parametrize("name", SIZES)
def test_inner_blocks_follow_what_is_shown_and_outer_ones_do_not(teachers, name):
    torch.manual_seed(0)
    words, size = teachers.dit.tokenizer, SIZES[name]
    module = Masked(*networks(size, len(words)), following=size.following)
    assert sorted([*size.priced, *size.following]) == [f"vit-block{i}-cross-map" for i in range(size.layers)]
    ids = words(["a red car on sand", ""], padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    batch = noised(torch.randn(2, 4, 8, 8), ids, torch.Generator().manual_seed(0))
    batch["t"][:] = 100
    free = module(**batch)
    assert "strays" not in free
    notes = torch.zeros(2, WORDS, 4, 4, dtype=torch.uint8)
    notes[:, 1] = 255  # the car is everywhere
    values = module(**batch, shown=at_tokens(notes, telling(words)[ids]))
    kept = module.kept[batch["t"]].view(-1, 1, 1, 1)
    noisy = kept.sqrt() * batch["latents"] + (1 - kept).sqrt() * batch["noise"]
    with torch.no_grad(), capture(module.unet, size.following, heads="mean") as maps:
        module.predict(noisy, batch["t"], module.read(ids), ids)
    car = torch.stack([each[0, ..., 2] for each in maps.values()]).mean(dim=0)
    torch.testing.assert_close(values["strays"], -kept[0].squeeze() * car.log().mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(values["loss"] - free["loss"], FOLLOWING * values["strays"], rtol=1e-3, atol=1e-6)
    values["strays"].backward()
    blocks = module.unet.transformer_blocks
    asked = [i for i, block in enumerate(blocks) if (grad := block.attn2.to_q.weight.grad) is not None and grad.any()]
    assert set(asked) >= {i for i in range(size.layers) if i not in size.outer}
    assert size.layers - 1 not in asked, "the last block is past them"
