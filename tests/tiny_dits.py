"""Random-weight transformer pipelines of the real diffusers classes, small enough for any test, the same every time."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tiny import clip_tokenizer
from tiny_families import _t5_tokenizer
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

WIDTH = 32


def _vae(channels: int, **config: Any) -> AutoencoderKL:
    """Eight pixels a cell, as all these pipelines have it."""
    return AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=channels,
        mid_block_add_attention=False, **config,
    )  # fmt: skip


def _t5() -> T5EncoderModel:
    vocabulary = len(_t5_tokenizer())
    return T5EncoderModel(T5Config(vocab_size=vocabulary, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def _clip(projection: bool = False, width: int = WIDTH) -> Any:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=width, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def _pixart(pipeline: Any, sample_size: int) -> Any:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=3,
        cross_attention_dim=24, sample_size=sample_size, caption_channels=WIDTH, interpolation_scale=1,
    )  # fmt: skip
    return pipeline(
        transformer=transformer, vae=_vae(4), text_encoder=_t5(), tokenizer=_t5_tokenizer(),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )  # fmt: skip


def pixart_alpha() -> Any:
    return _pixart(PixArtAlphaPipeline, 64)


def pixart_alpha_1024() -> Any:
    return _pixart(PixArtAlphaPipeline, 128)


def pixart_sigma() -> Any:
    return _pixart(PixArtSigmaPipeline, 64)


def hunyuan() -> Any:
    tokenizer = BertTokenizer(vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat"])})
    bert = BertModel(
        BertConfig(vocab_size=6, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=16,
        num_layers=4, cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH, pooled_projection_dim=16,
        text_len=77, text_len_t5=256,
    )  # fmt: skip
    return HunyuanDiTPipeline(
        vae=_vae(4), text_encoder=bert, tokenizer=tokenizer, transformer=transformer, scheduler=DDPMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, text_encoder_2=_t5(),
        tokenizer_2=_t5_tokenizer(),
    )  # fmt: skip


def _sd3(dual: tuple[int, ...], qk_norm: str | None) -> Any:
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=16, dual_attention_layers=dual, qk_norm=qk_norm,
    )  # fmt: skip
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(_t5_tokenizer()), d_model=2 * WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(16, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=_clip(True), tokenizer=clip_tokenizer(), text_encoder_2=_clip(True), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5, tokenizer_3=_t5_tokenizer(),
    )  # fmt: skip


def sd3() -> Any:
    return _sd3((), None)


def sd35_medium() -> Any:
    return _sd3((0, 1), "rms_norm")


def _flux(guidance: bool) -> Any:
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(4, shift_factor=0.1, scaling_factor=0.4), text_encoder=_clip(), tokenizer=clip_tokenizer(),
        text_encoder_2=_t5(), tokenizer_2=_t5_tokenizer(), transformer=transformer,
    )  # fmt: skip


def flux_dev() -> Any:
    return _flux(True)


def flux_schnell() -> Any:
    return _flux(False)


PIPELINES = {f.__name__: f for f in (
    pixart_alpha, pixart_alpha_1024, pixart_sigma, hunyuan, sd3, sd35_medium, flux_dev, flux_schnell
)}  # fmt: skip


def build(name: str) -> Any:
    """One of ``PIPELINES``, in eval mode, with weights that depend on nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = PIPELINES[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
            with torch.no_grad():  # some layers start at zero, which would hide what they do
                for weight in part.parameters():
                    if not weight.any():
                        weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    pipe.set_progress_bar_config(disable=True)
    return pipe
