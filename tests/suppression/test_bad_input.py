"""What does not fit is named; and the models of transformers that conditions and captions come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessor,
)

from diffusion_features import FeatureExtractor, LoadError
from diffusion_features.suppression import CFG, ControlNet, Denoise, FineGrainedPrompt, LoRA, as_technique
from diffusion_features.suppression.conditions import depth
from diffusion_features.suppression.words import from_words
from tests import tiny_dits
from tests.suppression.models import UNET_IDS, control, extractor, photo, save_lora, seeded
from tests.tiny import WORDS


def refused(fx: FeatureExtractor, technique: Any, message: str, **call: Any) -> None:
    with pytest.raises((ValueError, LoadError, TypeError), match=message):
        fx(photo(), suppress=technique, **call)


def test_a_family_without_control_says_so() -> None:
    fx = FeatureExtractor.from_pipe(seeded(tiny_dits.pixart_sigma), "vit-block0-out")
    refused(
        fx, ControlNet(control(extractor("unet"))), "no ControlNet for PixArtTransformer2DModel; it has some for UN"
    )


def test_a_control_of_another_class_or_another_base_model(tmp_path: Path) -> None:
    unet, sd3 = extractor("unet"), extractor("sd3")
    refused(sd3, ControlNet(control(unet)), "takes a SD3ControlNetModel, not a ControlNetModel")
    control(unet).save_pretrained(tmp_path / "control")
    refused(sd3, ControlNet(tmp_path / "control"), "is a ControlNetModel; this model takes a SD3ControlNetModel")
    other = ControlNetModel.from_config({**control(unet).config, "cross_attention_dim": 40})
    refused(unet, ControlNet(other), "another base model: its cross_attention_dim is 40, this model's is 24")


def test_a_control_that_is_missing_damaged_or_a_pickle(tmp_path: Path) -> None:
    fx = extractor("unet")
    refused(fx, ControlNet(tmp_path / "nowhere"), "There is no file or folder")
    (tmp_path / "empty").mkdir()
    refused(fx, ControlNet(tmp_path / "empty"), "no config.json")
    net = control(fx)
    net.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    refused(fx, ControlNet(tmp_path / "pickle"), "only as a pickle .* pickle=True")
    trusted = fx(photo(), suppress=ControlNet(tmp_path / "pickle", pickle=True))
    for id, feature in fx(photo(), suppress=ControlNet(net)).items():
        torch.testing.assert_close(trusted[id], feature)


def test_conditions_that_do_not_fit() -> None:
    fx = extractor("unet")
    net = control(fx)
    with pytest.raises(ValueError, match="no condition 'cany'; there are 'canny' and 'depth'"):
        ControlNet(net, "cany")
    refused(fx, ControlNet(net, photo(height=32)), "the condition is 32x64 .*, but the image is 64x64")
    refused(fx, ControlNet(net, [photo(), photo()]), "2 condition images for 1 images")
    refused(fx, ControlNet(net, torch.full((3, 64, 64), 2.0)), "must be in")
    refused(fx, ControlNet(net, 3), "a condition is 'canny', 'depth', a function")
    with pytest.raises(ValueError, match="looks at the images"):
        fx(None, latents=torch.zeros(1, 4, 8, 8), suppress=ControlNet(net))
    given = fx(photo(), suppress=ControlNet(net, photo(1)))
    as_tensor = (
        torch.stack([torch.tensor(list(photo(1).get_flattened_data())).reshape(64, 64, 3).permute(2, 0, 1)]) / 255
    )
    for id, feature in fx(photo(), suppress=ControlNet(net, lambda images: as_tensor)).items():
        torch.testing.assert_close(given[id], feature)


def test_a_lora_of_another_model(tmp_path: Path) -> None:
    unet, sd3 = extractor("unet"), extractor("sd3")
    refused(unet, LoRA(save_lora(sd3, tmp_path, "sd3")), "made for another model|does not fit")
    refused(sd3, LoRA(save_lora(unet, tmp_path, "unet")), "made for another model|does not fit")
    state = {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 7),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.zeros(7, 2),
    }
    save_file(state, tmp_path / "shape.safetensors")
    refused(unet, LoRA(tmp_path / "shape.safetensors"), "size mismatch")
    before = unet(photo())
    assert all(torch.equal(before[id], feature) for id, feature in unet(photo()).items())
    assert not hasattr(unet.denoiser, "peft_config")


def test_a_lora_that_is_missing_damaged_or_a_pickle(tmp_path: Path) -> None:
    fx = extractor("unet")
    refused(fx, LoRA(tmp_path / "nowhere.safetensors"), "There is no file")
    (tmp_path / "empty").mkdir()
    refused(fx, LoRA(tmp_path / "empty"), "holds no LoRA")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    refused(fx, LoRA(tmp_path / "cut.safetensors"), "no safetensors file, or is damaged")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    refused(fx, LoRA(tmp_path / "other.safetensors"), "is no LoRA: its weights are named weight")
    torch.save({}, tmp_path / "pickle.bin")
    refused(fx, LoRA(tmp_path / "pickle.bin"), "no safetensors file.* pickle=True")
    folder = tmp_path / "several"
    save_lora(fx, folder, "a")
    save_lora(fx, folder, "b", seed=1)
    refused(fx, LoRA(folder), r"choose one by weight_name: a.safetensors, b.safetensors")
    fx(photo(), suppress=LoRA(folder, weight_name="b.safetensors"))


def test_techniques_that_contradict_each_other_or_the_call() -> None:
    fx = extractor("unet")
    refused(fx, [FineGrainedPrompt("a"), FineGrainedPrompt("b")], "takes one FineGrainedPrompt")
    refused(fx, Denoise(), "one t at a time", t=[50, 100])
    refused(fx, Denoise(), "not both", denoise_from=80)
    refused(fx, Denoise(by=960), "out of range")
    refused(fx, CFG(), "Add Denoise")
    refused(fx, [{"type": "Lora", "source": "x"}], "no technique 'Lora'.* did you mean 'LoRA'")
    refused(fx, "canny", "takes techniques such as ControlNet")
    with pytest.raises(ValueError, match="at least 1"):
        Denoise(by=0)
    with pytest.raises(ValueError, match=r"\{promt\} is no field"):
        FineGrainedPrompt("{promt}")
    with pytest.raises(ValueError, match="go together"):
        FineGrainedPrompt("{caption}")
    with pytest.raises(ValueError, match="returned 2 captions for 1 images"):
        fx(photo(), suppress=FineGrainedPrompt("{caption}", captioner=lambda images: ["a", "b"]))


def test_words() -> None:
    fx = extractor("unet")
    assert from_words("lora=a@b.safetensors", fx) == LoRA("a@b.safetensors")
    assert from_words("lora=a.safetensors@0.5", fx) == LoRA("a.safetensors", scale=0.5)
    assert from_words("prompt=me@home 3@4", fx) == FineGrainedPrompt("me@home 3@4")
    assert from_words("canny=folder@2", fx) == ControlNet("folder", "canny", 2.0)
    assert from_words("depth@0.5", fx) == ControlNet("lllyasviel/sd-controlnet-depth", "depth", 0.5)
    assert from_words("denoise=20", fx) == Denoise(20) and from_words("cfg", fx) == CFG(7.5)
    assert as_technique(from_words("cfg=3", fx)) == CFG(3.0)


# ---- models of transformers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def depth_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("dpt")
    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16,
        neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, backbone_out_indices=[0, 1, 2, 3],
    )  # fmt: skip
    seeded(lambda: DPTForDepthEstimation(config)).save_pretrained(folder)
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def test_depth_is_stretched_and_of_the_images_size(depth_model: str) -> None:
    images = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = depth(images, model=depth_model)
    assert found.shape == images.shape
    for each in found:
        assert each.min() == 0 and each.max() == 1
    torch.testing.assert_close(depth(images[1:], model=depth_model), found[1:])


def test_a_captioner_of_transformers(tmp_path: Path) -> None:
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = BertTokenizer(vocab=vocab)
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    text = dict(vocab_size=len(vocab), bos_token_id=2, eos_token_id=3, sep_token_id=3, pad_token_id=0,
                encoder_hidden_size=16, max_position_embeddings=200, **small)  # fmt: skip
    config = BlipConfig(text_config=text, vision_config=dict(image_size=32, patch_size=16, **small))
    seeded(lambda: BlipForConditionalGeneration(config)).save_pretrained(tmp_path)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(tmp_path)
    technique = FineGrainedPrompt("{prompt}: {caption}", captioner=str(tmp_path))
    fx = extractor("unet")
    seen: list[Any] = []
    fx.pipe.text_encoder.register_forward_pre_hook(lambda m, args: seen.append(args))
    fx(photo(), "a cat", suppress=technique, activations=UNET_IDS[0])
    again = technique.asks(_call(photo())).prompts
    assert isinstance(again, list) and again[0].startswith("a cat: ") and len(again[0]) > len("a cat: ")
    assert technique.asks(_call(photo())).prompts == again and seen


def _call(image: Image.Image) -> Any:
    from diffusion_features.suppression import Call

    return Call(image, "a cat")
