"""Random-weight pipelines with the topology of the supported model families, small enough to load in a second or two.

Each ``save_*`` writes an ordinary diffusers folder, always with the same weights. Blocks, repeats, transformer depths,
conditioning and scheduler settings are those of the released models; only the channels are few.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    IFPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.tiny import MAX_TOKENS, WORDS, clip_tokenizer

SD_BETAS: dict[str, Any] = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def save_sd21(folder: str | Path) -> Path:
    """Stable Diffusion 2.1 (768): v-prediction under DDIM, linear projections, one head count a level, gelu CLIP."""

    def build() -> StableDiffusionPipeline:
        tokenizer = _padded_with_exclamation_mark()
        return StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(_clip_config(tokenizer, 24, "gelu")),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(
                sample_size=12,
                block_out_channels=(8, 16, 32, 32),
                layers_per_block=2,
                down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
                up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
                cross_attention_dim=24,
                attention_head_dim=(1, 2, 4, 4),
                use_linear_projection=True,
                norm_num_groups=4,
            ),
            scheduler=DDIMScheduler(
                **SD_BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    return _save(build, folder)


def save_sdxl(folder: str | Path) -> Path:
    """Stable Diffusion XL: transformers 1, 2 and 10 blocks deep, two CLIP encoders, Euler leading with offset 1."""
    return _save(_sdxl, folder)


def save_playground_v2(folder: str | Path) -> Path:
    """Playground v2: the architecture and noise schedule of SDXL with weights of its own."""
    return _save(_sdxl, folder, seed=1)


def save_if(folder: str | Path) -> Path:
    """DeepFloyd IF, stage I: works on pixels, T5 text, added-key attention inside its blocks, learned variance."""

    def build() -> IFPipeline:
        tokenizer = _t5_tokenizer()
        return IFPipeline(
            tokenizer=tokenizer,
            text_encoder=T5EncoderModel(
                T5Config(
                    vocab_size=len(tokenizer),
                    d_model=24,
                    d_kv=6,
                    d_ff=48,
                    num_layers=2,
                    num_heads=4,
                    feed_forward_proj="gated-gelu",
                )
            ),
            unet=_if_unet(),
            scheduler=DDPMScheduler(
                beta_schedule="squaredcos_cap_v2",
                variance_type="learned_range",
                thresholding=True,
                dynamic_thresholding_ratio=0.95,
                sample_max_value=1.5,
            ),
            safety_checker=None,
            feature_extractor=None,
            watermarker=None,
            requires_safety_checker=False,
        )

    return _save(build, folder)


def _save(build: Callable[[], DiffusionPipeline], folder: str | Path, seed: int = 0) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build().save_pretrained(folder)
    return Path(folder)


def _sdxl() -> StableDiffusionXLPipeline:
    tokenizer, tokenizer_2 = clip_tokenizer(), _padded_with_exclamation_mark()
    return StableDiffusionXLPipeline(
        vae=_vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=CLIPTextModel(_clip_config(tokenizer, 16, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer_2, 24, "gelu")),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 16, 32),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(1, 2, 4),
            cross_attention_dim=16 + 24,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 24,
            norm_num_groups=4,
        ),
        scheduler=EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading"),
        add_watermarker=False,
    )


def _if_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        block_out_channels=(8, 16, 24, 32),
        layers_per_block=3,
        down_block_types=("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
        only_cross_attention=True,
        mid_block_only_cross_attention=True,
        cross_attention_dim=32,  # the group norm of the text takes 32 groups
        cross_attention_norm="group_norm",
        encoder_hid_dim=24,
        attention_head_dim=4,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
        resnet_skip_time_act=True,
        time_embedding_act_fn="gelu",
        act_fn="gelu",
        norm_num_groups=4,
    )


def _vae(**settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        **settings,
    )


def _clip_config(tokenizer: CLIPTokenizer, width: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act=activation,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _padded_with_exclamation_mark() -> CLIPTokenizer:
    """OpenCLIP's tokenizer: the same words as CLIP's, but padding is "!", its token 0."""
    tokenizer = clip_tokenizer()
    tokenizer.pad_token = "!"
    return tokenizer


def _t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer that knows ``WORDS`` as one token each and spells other lower-case text by its letters."""
    pieces = ["▁", *(f"▁{word}" for word in WORDS), *map(chr, range(33, 127))]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(piece, -2.0 - (len(piece) == 1)) for piece in dict.fromkeys(pieces)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=MAX_TOKENS)


def save_single_file(folder: str | Path, path: str | Path) -> Path:
    """Write a Stable Diffusion 1 folder as one checkpoint with the names of the original code; return its path."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    weights = {
        f"model.diffusion_model.{_renamed(name, _unet_renames(2, 4))}": weight
        for name, weight in pipe.unet.state_dict().items()
    }
    for name, weight in pipe.vae.state_dict().items():
        is_attention = ".attentions." in name and weight.ndim == 2  # a 1x1 convolution in the original
        weights[f"first_stage_model.{_renamed(name, _vae_renames(4))}"] = (
            weight[:, :, None, None] if is_attention else weight
        )
    for name, weight in pipe.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = weight
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path)
    return Path(path)


def _renamed(name: str, renames: dict[str, str]) -> str:
    for ours, original in renames.items():
        name = re.sub(ours, original, name)
    return name


def _unet_renames(repeats: int, levels: int) -> dict[str, str]:
    renames = {
        r"^conv_in\.": "input_blocks.0.0.",
        r"^conv_norm_out\.": "out.0.",
        r"^conv_out\.": "out.2.",
        r"^time_embedding\.linear_1\.": "time_embed.0.",
        r"^time_embedding\.linear_2\.": "time_embed.2.",
        r"^mid_block\.resnets\.0\.": "middle_block.0.",
        r"^mid_block\.attentions\.0\.": "middle_block.1.",
        r"^mid_block\.resnets\.1\.": "middle_block.2.",
    }
    for level in range(levels):
        first_in, first_out = 1 + level * (repeats + 1), level * (repeats + 1)
        for repeat in range(repeats + 1):
            for place, part in enumerate(("resnets", "attentions")):
                down, up = rf"^down_blocks\.{level}\.{part}\.{repeat}\.", rf"^up_blocks\.{level}\.{part}\.{repeat}\."
                renames[down] = f"input_blocks.{first_in + repeat}.{place}."
                renames[up] = f"output_blocks.{first_out + repeat}.{place}."
        renames[rf"^down_blocks\.{level}\.downsamplers\.0\.conv\."] = f"input_blocks.{first_in + repeats}.0.op."
        after = 2 if level else 1  # the first up level of Stable Diffusion 1 has no attention
        renames[rf"^up_blocks\.{level}\.upsamplers\.0\."] = f"output_blocks.{first_out + repeats}.{after}."
    return renames | {
        r"(blocks?\.\d+\.0|middle_block\.[02])\.norm1\.": r"\1.in_layers.0.",
        r"\.conv1\.": ".in_layers.2.",
        r"\.time_emb_proj\.": ".emb_layers.1.",
        r"(blocks?\.\d+\.0|middle_block\.[02])\.norm2\.": r"\1.out_layers.0.",
        r"\.conv2\.": ".out_layers.3.",
        r"\.conv_shortcut\.": ".skip_connection.",
    }


def _vae_renames(levels: int) -> dict[str, str]:
    renames = {
        r"^encoder\.down_blocks\.(\d)\.resnets\.": r"encoder.down.\1.block.",
        r"^encoder\.down_blocks\.(\d)\.downsamplers\.0\.": r"encoder.down.\1.downsample.",
        r"\.mid_block\.resnets\.0\.": ".mid.block_1.",
        r"\.mid_block\.resnets\.1\.": ".mid.block_2.",
        r"\.mid_block\.attentions\.0\.": ".mid.attn_1.",
        r"\.group_norm\.": ".norm.",
        r"\.to_([qkv])\.": r".\1.",
        r"\.to_out\.0\.": ".proj_out.",
        r"\.conv_norm_out\.": ".norm_out.",
        r"\.conv_shortcut\.": ".nin_shortcut.",
    }
    for level in range(levels):
        original = f"decoder.up.{levels - 1 - level}"
        renames[rf"^decoder\.up_blocks\.{level}\.resnets\."] = f"{original}.block."
        renames[rf"^decoder\.up_blocks\.{level}\.upsamplers\.0\."] = f"{original}.upsample."
    return renames
