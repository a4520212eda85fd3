"""Prompts that a captioner makes of an image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

from diffusion_features import FeatureExtractor
from diffusion_features.captioning import captioner
from diffusion_features.cli import main
from segmentors import Segmentation, TrainingFreeSegmentor
from segmentors.training_free.prompts import passes
from segmentors.training_free.steps import steps
from tests.tiny import save_sd15, sd15_pipe

RED, GREEN = Image.new("RGB", (64, 64), (220, 20, 20)), Image.new("RGB", (64, 64), (20, 220, 20))


@pytest.fixture(scope="module")
def fx() -> FeatureExtractor:
    return FeatureExtractor.from_pipe(sd15_pipe())


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random BLIP that would sample if it were let, and says one word after the other without end."""
    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "photo", "of", "red", "dog", "grass"]
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=len(words), encoder_hidden_size=16, max_position_embeddings=160, bos_token_id=5,
                eos_token_id=3, sep_token_id=3, pad_token_id=0, **small)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BlipForConditionalGeneration(
            BlipConfig(text_config=text, vision_config=dict(image_size=32, patch_size=16, **small))
        )
        model.text_decoder.cls.predictions.bias.data[:6] = -100  # only words
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return str(folder)


def colours(images: list[Image.Image]) -> list[str]:
    """Says which of red and green is there."""
    return [" A red dog. " if image.getpixel((0, 0))[0] > 128 else "" for image in images]  # type: ignore[index]


def test_each_image_is_told_of_by_its_own_caption(fx: FeatureExtractor) -> None:
    segmentor = TrainingFreeSegmentor(fx, captioner=colours)
    red, green, again = segmentor([RED, GREEN, RED], ["dog", "cat"], ["grass"])
    assert red.prompts == ("A red dog., cat, grass",) == again.prompts and green.prompts == ("dog, cat, grass",)
    by_hand = TrainingFreeSegmentor(fx)(RED, ["dog", "cat"], ["grass"], caption="A red dog.")
    assert isinstance(by_hand, Segmentation) and torch.allclose(by_hand.scores, red.scores, atol=1e-3)
    told = segmentor(RED, ["dog", "cat"], caption="a cat")
    assert isinstance(told, Segmentation) and told.prompts == ("a cat, dog",)  # what a call says goes first


def test_steps_read_the_same_caption(fx: FeatureExtractor) -> None:
    with_captioner = steps(TrainingFreeSegmentor(fx, captioner=colours), RED, ["dog", "cat"])
    by_hand = steps(TrainingFreeSegmentor(fx), RED, ["dog", "cat"], caption="A red dog.")
    assert all(torch.equal(maps, by_hand[step]) for step, maps in with_captioner.items())


def test_a_captioner_of_transformers_is_greedy_and_what_is_too_long_is_left_out(
    blip: str, fx: FeatureExtractor
) -> None:
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    first, second = captioner(blip)([noise, noise])
    assert first == second and len(first.split()) > 100
    found = TrainingFreeSegmentor(fx, captioner=blip)(noise, ["cat"])
    assert isinstance(found, Segmentation)
    told, words = found.prompts[0], first.split()
    kept = len(told.split())
    assert 30 < kept < len(words) and told == " ".join(words[:kept])
    one_more = " ".join(words[: kept + 1])
    with pytest.raises(ValueError, match="the caption is longer"):
        passes(TrainingFreeSegmentor(fx).parts, {"cat": ["cat"]}, caption=one_more)
    assert found.prompts[1:] == ("cat",)


def test_the_command_takes_a_captioner(blip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RED.save(tmp_path / "red.png")
    model = str(save_sd15(tmp_path / "model"))
    command = ["segment", str(tmp_path / "red.png"), "--classes", "dog", "cat", "--model", model]
    out = ["-o", str(tmp_path / "out")]
    assert main([*command, "--captioner", blip, "--edges", "pamr", *out]) == 0
    prompts = json.loads((tmp_path / "out" / "red.png.json").read_text())["prompts"]
    assert captioner(blip)([RED])[0].strip().startswith(prompts[0])
    assert main([*command, "--captioner", str(tmp_path / "nothing"), *out]) == 2
    assert "nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--captioner", blip, "--caption", "a dog", *out])
