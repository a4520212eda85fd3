"""Random-weight transformer pipelines of the real diffusers classes, small enough for any test, the same every time."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny import WORDS, _byte_letters, clip_tokenizer
from tests.tiny_families import _t5_tokenizer

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


def auraflow() -> Any:
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=16, out_channels=4,
        pos_embed_max_size=256,
    )  # fmt: skip
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(_t5_tokenizer()), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    return AuraFlowPipeline(
        tokenizer=_t5_tokenizer(), text_encoder=text_encoder, vae=_vae(4, scaling_factor=0.13025),
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )  # fmt: skip


def sana() -> Any:
    channels = (8, 8, 8, 8, 16, 32)
    vae = AutoencoderDC(
        latent_channels=32, attention_head_dim=8, scaling_factor=0.41407,
        encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3, decoder_block_types="ResBlock",
        encoder_block_out_channels=channels, decoder_block_out_channels=channels,
        encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)), decoder_qkv_multiscales=((),) * 6,
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        in_channels=32, out_channels=32, num_attention_heads=4, attention_head_dim=4, num_layers=3,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH,
        sample_size=8, patch_size=1,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    return SanaPipeline(
        tokenizer=_gemma_tokenizer(), text_encoder=_gemma(), vae=vae, transformer=transformer, scheduler=scheduler
    )


def lumina2() -> Any:
    transformer = Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=3, num_refiner_layers=1,
        num_attention_heads=4, num_kv_heads=2, multiple_of=8, axes_dim_rope=(2, 2, 2), axes_lens=(300, 32, 32),
        cap_feat_dim=WIDTH,
    )  # fmt: skip
    return Lumina2Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0), text_encoder=_gemma(),
        vae=_vae(4, shift_factor=0.1159, scaling_factor=0.3611), tokenizer=_gemma_tokenizer(),
    )  # fmt: skip


def _gemma_tokenizer() -> GemmaTokenizer:
    """Knows some words as one token each and spells other text by its letters."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *map(chr, range(33, 127))]
    merges = _merges(WORDS)
    vocab = {piece: index for index, piece in enumerate([*pieces, *map("".join, merges)])}
    return GemmaTokenizer(vocab=vocab, merges=merges, padding_side="right")


def _merges(words: Any) -> list[tuple[str, str]]:
    """What byte-pair encoding joins, so that each word is one token."""
    return list(dict.fromkeys((word[:n], word[n]) for word in words for n in range(1, len(word))))


def _gemma() -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(_gemma_tokenizer()), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        )
    )  # fmt: skip


def qwen() -> Any:
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[-0.8, 0.1, 0.4, 0.0],
        latents_std=[2.8, 1.5, 2.3, 0.9],
    )  # fmt: skip
    layers = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=2, vocab_size=len(_qwen_tokenizer()), bos_token_id=0, eos_token_id=0,
                  rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]})  # fmt: skip
    sight = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True), vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=layers, vision_config=sight)),
        tokenizer=_qwen_tokenizer(), transformer=transformer,
    )  # fmt: skip


def zimage() -> Any:
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[1024, 32, 32],
    )  # fmt: skip
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=_vae(4, shift_factor=0.1, scaling_factor=0.4),
        text_encoder=Qwen3Model(_qwen3(2)), tokenizer=_qwen_tokenizer(), transformer=transformer,
    )  # fmt: skip


def flux2_klein() -> Any:
    return Flux2KleinPipeline(
        text_encoder=Qwen3ForCausalLM(_qwen3(28)), tokenizer=_qwen_tokenizer(), **_flux2(guidance=False)
    )


def flux2_dev() -> Any:
    tokenizer = _qwen_tokenizer()
    template = (
        "<|im_start|>{% for m in messages %}[{{ m.role }}]{% for c in m.content %}{{ c.text }}{% endfor %}"
        "[/{{ m.role }}]{% endfor %}"
    )
    text = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=31, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    sight = PixtralVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return Flux2Pipeline(
        text_encoder=Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=sight)),
        tokenizer=_TextProcessor(tokenizer, chat_template=template),
        **_flux2(guidance=True),
    )  # fmt: skip


class _TextProcessor(ProcessorMixin):
    """What a PixtralProcessor, which needs torchvision, does with text."""

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)


def _flux2(guidance: bool) -> dict[str, Any]:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=4,
        mid_block_add_attention=False,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"scheduler": scheduler, "vae": vae, "transformer": transformer}


def _qwen_tokenizer() -> Qwen2Tokenizer:
    """Knows some words as one token each and spells other text by its bytes; writes a chat as the released one does."""
    merges = _merges(["Ġ" + word for word in WORDS])
    pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_byte_letters(), *map("".join, merges)]
    tokenizer = Qwen2Tokenizer(vocab={p: i for i, p in enumerate(dict.fromkeys(pieces))}, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def _qwen3(layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(_qwen_tokenizer()), hidden_size=16, intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


PIPELINES = {f.__name__: f for f in (
    pixart_alpha, pixart_alpha_1024, pixart_sigma, hunyuan, sd3, sd35_medium, flux_dev, flux_schnell, auraflow,
    sana, lumina2, qwen, zimage, flux2_klein, flux2_dev,
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
