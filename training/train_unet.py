"""Trains the UNet and the text encoder of the embedded pipeline, then exports it.

Each step takes scenes of 64 pixels, where words and shapes are learnt at a fifth of the cost, and some steps of 128.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 training/train_unet.py --steps 8000  # on two CPU cores
    python training/train_unet.py --steps 8000 --precision bf16  # on a GPU
"""

from __future__ import annotations

import copy
import filecmp
import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
import words
from data import Captioned, latents, telling
from diffusers import AutoencoderKL, DiffusionPipeline, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from loop import Batch, Task, arguments, denoiser, first, train
from noising import NOISE, Denoising, noised
from notes import CAPTIONS, lessons
from pictures import COLUMNS, PROMPTS, samples
from scenes import ROOT, RUNS, load
from torch import Generator, Tensor
from train_vae import FOLDER as VAE_FOLDER
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion_features.embedded.world import HELD_OUT_SEED, render

SEED = 20_261_122
EXPORT = ROOT / "diffusion_features" / "embedded" / "sd"
#: Scenes of each set in a step that has them, and how many steps apart those are.
BATCH, EVERY = {"small": 32, "large": 16}, {"small": 1, "large": 4}
#: Cross-attention outside the layers of 16x16 cells, which find words at the native size. These hardly do, and are in
#: every plain average.
PRICED = [f"{part}-*-cross-map" for part in ("down-level0", "down-level2", "mid", "up-level1", "up-level3")]
#: The layers that find words best. There, looking at any token that does not say what is seen has the price.
READING = ["up-level2-*-cross-map"]
#: All layers of 16x16 cells, which can be taught where to look.
TAUGHT = ["down-level1-*-cross-map", *READING]
#: Tokens that a prompt is padded to; one caption in a hundred is longer. Padding draws attention from the words.
TOKENS = 32


def networks(tokenizer: CLIPTokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Return the untrained UNet (SD 1.5's topology, narrower) and text encoder."""
    unet = UNet2DConditionModel(
        sample_size=32, in_channels=4, out_channels=4, block_out_channels=(32, 64, 96, 128), layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=96, attention_head_dim=(2, 4, 4, 4), norm_num_groups=16,
    )  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=96, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    return unet, text


def shipped(tokenizer: CLIPTokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Return the networks with the weights that the package has, to train on."""
    unet, text = networks(tokenizer)
    unet.load_state_dict(UNet2DConditionModel.from_pretrained(EXPORT, subfolder="unet").state_dict())
    text.load_state_dict(CLIPTextModel.from_pretrained(EXPORT, subfolder="text_encoder").state_dict())
    return unet, text


def unpack() -> None:
    """Put the autoencoder and the tokenizer that the package has where newly trained ones would be.

    Raises:
        SystemExit: others are there.
    """
    for part, file in ((VAE_FOLDER, "diffusion_pytorch_model.safetensors"), (RUNS / "tokenizer", "vocab.json")):
        if not part.exists():
            shutil.copytree(EXPORT / part.name, part)
        if not filecmp.cmp(part / file, EXPORT / part.name / file, shallow=False):
            raise SystemExit(f"{part} is not the one that the package has: move {RUNS} away to train on from there.")


def tokenizer() -> CLIPTokenizer:
    """Return the tokenizer of the world's words, made from the captions at the first call."""
    folder = RUNS / "tokenizer"
    if not folder.exists():
        # The words of the held-out styles are known too, so that an adapter can learn them.
        held_out = (render(seed, 32, supersample=1).caption for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + 500))
        words.build(chain(held_out, (text for name in BATCH for scene in load(name)[1] for text in scene)), folder)
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=TOKENS)


def padding(ids: Tensor) -> Tensor:
    """Where a caption has ended, bool [N, tokens]: at its end token and at the copies of it that follow.

    A CLIP text encoder is causal: each of these tokens can sum up the whole caption, and a denoiser that
    finds everything there learns to look at no word.
    """
    return ids == ids[:, -1:]


@torch.no_grad()
def validation(module: Denoising, data: Captioned, hints: Tensor | None = None) -> dict[str, float]:
    """Return the plain loss on all scenes of ``data`` with fixed noise, and with ``hints`` for a ControlNet."""
    generator, device = Generator().manual_seed(SEED), next(module.parameters()).device
    found = []
    for i in range(0, len(data.latents), 16):
        x = data.latents[i : i + 16].float()
        batch = noised(x, data.ids[i : i + 16, 0].long(), generator)
        if hints is not None:
            batch["hint"] = hints[i : i + 16]
        found.append(module(**{name: value.to(device) for name, value in batch.items()})["plain"].item())
    return {"validation": sum(found) / len(found)}


def pipeline(module: Denoising, words: CLIPTokenizer, dtype: torch.dtype) -> StableDiffusionPipeline:
    """Return copies of the networks as a pipeline on the CPU."""
    vae = AutoencoderKL.from_pretrained(VAE_FOLDER)
    parts = [copy.deepcopy(each).eval().to("cpu", dtype) for each in (vae, module.text, module.unet)]
    scheduler = PNDMScheduler(**NOISE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    # SD 1.5 ships this entry too: DDIM and DDPM read it when they are made from this configuration.
    scheduler.register_to_config(clip_sample=False)
    return StableDiffusionPipeline(
        vae=parts[0], text_encoder=parts[1], unet=parts[2], tokenizer=words, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def export(pipe: DiffusionPipeline, folder: Path, also: Sequence[Path] = ()) -> None:
    """Write the pipeline, and files ``also`` into its tokenizer's folder, beside ``folder``, then move it there."""
    fresh, stale = folder.with_suffix(".new"), folder.with_suffix(".old")
    for path in (fresh, stale):
        shutil.rmtree(path, ignore_errors=True)
    pipe.vae.register_to_config(_name_or_path="")  # it would say where it lay on the machine that trained
    pipe.save_pretrained(fresh, safe_serialization=True)
    for path in also:
        shutil.copyfile(path, fresh / "tokenizer" / path.name)
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)


def main() -> None:
    """Train from the command line."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--reading",
        action="store_true",
        help="in up-level2, looking at tokens that do not say what is seen has that price",
    )
    options = denoiser(parser)
    if options.taught and options.reading:
        parser.error("--reading draws attention off the start token, --taught also towards it: give one of them")
    torch.manual_seed(SEED)
    with first():
        if options.shipped:
            unpack()
        vae, words = AutoencoderKL.from_pretrained(VAE_FOLDER).eval(), tokenizer()
        encoded = {name: latents(name, vae) for name in (*BATCH, "validation")}
        captions = {name: load(name)[1] for name in encoded}
    tells = telling(words)
    if options.taught:
        # The start token is the same in any prompt; the end token sums it up, and is the padding too.
        lesson = lessons(len(encoded["large"]), tells, words.bos_token_id, words.pad_token_id)
        captions["large"] = [scene[:CAPTIONS] for scene in captions["large"]]
    sets = {name: Captioned(encoded[name], captions[name], words, TOKENS) for name in encoded}
    unet, text = (shipped if options.shipped else networks)(words)
    priced, reading = PRICED if options.priced else (), READING if options.reading else ()
    following = TAUGHT if options.taught else ()
    module = Denoising(unet, text, priced=priced, reading=reading, telling=tells, following=following)

    def batches(step: int, share: float, generator: Generator) -> list[Batch]:
        due = ["large"] if options.native else [name for name in BATCH if step % EVERY[name] == 0]
        return [taken(name, round(BATCH[name] * share), generator) for name in due]

    def taken(name: str, size: int, generator: Generator) -> Batch:
        which, x, ids = sets[name].draw(size, generator)
        told = {}
        if options.taught and name == "large":  # of others nothing was noted
            ids, told["shown"] = lesson(which, ids, generator)
        return noised(x, ids, generator) | {"silent": padding(ids)} | told

    def measure() -> dict[str, float]:
        samples(pipeline(module, words, torch.float32), PROMPTS[:COLUMNS], steps=10).save(options.runs / "unet.png")
        return validation(module, sets["validation"])

    def publish() -> None:
        legacy = [RUNS / "tokenizer" / name for name in ("vocab.json", "merges.txt")]
        export(pipeline(module, words, torch.float16), EXPORT, legacy)

    train(Task("unet", module, batches, measure, publish, SEED, rate=8e-4), options)


if __name__ == "__main__":
    main()
