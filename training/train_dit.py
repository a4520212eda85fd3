"""Trains the transformer of the embedded PixArt pipeline and its T5 text encoder, then exports the pipeline.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 training/train_dit.py dit --steps 8000  # on two CPU cores
    python training/train_dit.py dit-small --steps 8000 --precision bf16  # on a GPU

Same scenes, same latents and same objective as the UNet's. The two sizes differ in nothing but depth and width.
"""

from __future__ import annotations

import copy
import string
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from data import Captioned, latents, telling
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from loop import Batch, Task, arguments, denoiser, first, train
from noising import NOISE, Denoising, noised
from notes import CAPTIONS, lessons
from pictures import COLUMNS, PROMPTS, samples
from scenes import ROOT, load
from torch import Generator, Tensor
from train_unet import export, unpack, validation
from train_vae import FOLDER as VAE_FOLDER
from transformers import T5Config, T5EncoderModel, T5Tokenizer

SEED = 20_261_125
FOLDER = ROOT / "diffusion_features" / "embedded"
#: Scenes of each set in a step that has them, and how many steps apart those are.
BATCH, EVERY = {"small": 64, "large": 16}, {"small": 1, "large": 4}
#: Longer than any caption of the world. What is padded is masked, so this changes nothing but the time of a step.
TOKENS = 48
PADDING, END = 0, 1  # ids of T5's tokens; all others are above
FAR = -1e4  # added to attention, leaves none; float16 has it
CONTEXT = 120  # tokens that a PixArtAlphaPipeline pads to


@dataclass(frozen=True)
class Size:
    """Of the transformer: its blocks, their heads of 32 channels, the learning rate, and its outer blocks.

    Their cross-attention hardly finds words, and is in every plain average. That of the inner ones does.
    """

    layers: int
    heads: int
    rate: float
    outer: tuple[int, ...] = ()

    @property
    def priced(self) -> list[str]:
        """The maps of the outer blocks."""
        return [f"vit-block{i}-cross-map" for i in self.outer]

    @property
    def following(self) -> list[str]:
        """The maps of the inner blocks."""
        return [f"vit-block{i}-cross-map" for i in range(self.layers) if i not in self.outer]


SIZES = {"dit": Size(8, 4, 1e-3, outer=(0, 1, 6, 7)), "dit-small": Size(4, 2, 1e-3, outer=(0, 3))}


class Masked(Denoising):
    """The denoising of a transformer that is told which tokens are padding."""

    def read(self, ids: Tensor) -> Tensor:
        """Return the text encoder's last hidden state, [N, tokens, width]."""
        text: Tensor = self.text(ids, attention_mask=(ids != PADDING).long()).last_hidden_state
        return text

    def words(self, ids: Tensor) -> Tensor:
        """Where the words of a caption are, bool [N, tokens]: before its end token and the padding."""
        return ids > END

    def predict(self, noisy: Tensor, t: Tensor, text: Tensor, ids: Tensor, hint: Tensor | None = None) -> Tensor:
        """Return the predicted noise, [N, 4, h, w]."""
        none = {"resolution": None, "aspect_ratio": None}
        predicted: Tensor = self.unet(noisy, text, t, none, encoder_attention_mask=(ids != PADDING).long()).sample
        return predicted


def tokenizer(words: Iterable[str]) -> T5Tokenizer:
    """Return a T5 tokenizer to which each of ``words`` is one token, and any other text pieces, down to letters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    whole = [("▁" + word, -1.0) for word in sorted(words)]
    letters = [(letter, -12.0) for letter in "▁" + string.ascii_lowercase + string.digits]
    marks = [(mark, -2.0) for mark in string.punctuation]
    return T5Tokenizer(vocab=[*special, *whole, *letters, *marks], extra_ids=0, model_max_length=CONTEXT)


def networks(size: Size, tokens: int) -> tuple[PixArtTransformer2DModel, T5EncoderModel]:
    """Return the untrained transformer and text encoder."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=size.heads, attention_head_dim=32, num_layers=size.layers, sample_size=32, patch_size=2,
        in_channels=4, out_channels=4, cross_attention_dim=32 * size.heads, caption_channels=96,
        use_additional_conditions=False,
    )  # fmt: skip
    return transformer, text_encoder(tokens)


def text_encoder(tokens: int) -> T5EncoderModel:
    """Return an untrained encoder of one layer in which a token reads itself and the one before it, and no other.

    So "car" says that it is red in "a red car on a gray road". Without a layer, a caption would say which colours and
    things there are and not whose is which. And a token that could carry the whole caption would be looked at
    everywhere, and where its word is would not be seen.

    T5 adds a number for the distance between two tokens to their attention. Here it is not learnt.
    """
    text = T5EncoderModel(T5Config(
        vocab_size=tokens, d_model=96, num_layers=1, num_heads=3, d_kv=32, d_ff=384, dropout_rate=0.0,
        relative_attention_num_buckets=8,
    ))  # fmt: skip
    attention, feed = text.encoder.block[0].layer
    distances = attention.SelfAttention.relative_attention_bias.weight.requires_grad_(requires_grad=False)
    distances.fill_(FAR)[:2] = 0  # rows of the token itself and of the one before it
    for last in (attention.SelfAttention.o, feed.DenseReluDense.wo):
        torch.nn.init.zeros_(last.weight)  # begins as if there were no layer
    return text


def shipped(name: str, tokens: int) -> tuple[PixArtTransformer2DModel, T5EncoderModel]:
    """Return the networks of size ``name`` with the weights that the package has, to train on."""
    transformer, text = networks(SIZES[name], tokens)
    transformer.load_state_dict(
        PixArtTransformer2DModel.from_pretrained(FOLDER / name, subfolder="transformer").state_dict()
    )
    text.load_state_dict(T5EncoderModel.from_pretrained(FOLDER / name, subfolder="text_encoder").state_dict())
    return transformer, text


def pipeline(module: Masked, words: T5Tokenizer, dtype: torch.dtype) -> PixArtAlphaPipeline:
    """Return copies of the networks as a pipeline on the CPU."""
    vae = AutoencoderKL.from_pretrained(VAE_FOLDER)
    parts = [copy.deepcopy(each).eval().to("cpu", dtype) for each in (vae, module.text, module.unet)]
    scheduler = DPMSolverMultistepScheduler(**NOISE)
    scheduler.register_to_config(clip_sample=False)  # as for the UNet: DDIM would clip latents otherwise
    return PixArtAlphaPipeline(
        vae=parts[0], text_encoder=parts[1], transformer=parts[2], tokenizer=words, scheduler=scheduler
    )


def main() -> None:
    """Train from the command line."""
    parser = arguments(__doc__)
    parser.add_argument("size", choices=list(SIZES))
    options = denoiser(parser)
    name, size = options.size, SIZES[options.size]
    torch.manual_seed(SEED)
    with first():
        if options.shipped:
            unpack()
        vae = AutoencoderKL.from_pretrained(VAE_FOLDER).eval()
        used = {"large": 1} if options.native else EVERY
        encoded = {part: latents(part, vae) for part in (*used, "validation")}
        captions = {part: load(part)[1] for part in (*BATCH, "validation")}
    texts = (text for scenes in captions.values() for scene in scenes for text in scene)
    words = tokenizer({word.strip(string.punctuation) for text in texts for word in text.lower().split()})
    if options.taught:
        lesson = lessons(len(encoded["large"]), telling(words), END, PADDING)
        captions["large"] = [scene[:CAPTIONS] for scene in captions["large"]]
    sets = {part: Captioned(encoded[part], captions[part], words, TOKENS) for part in encoded}
    begin = shipped(name, len(words)) if options.shipped else networks(size, len(words))
    priced, following = size.priced if options.priced else (), size.following if options.taught else ()
    module = Masked(*begin, priced=priced, following=following)

    def batches(step: int, share: float, generator: Generator) -> list[Batch]:
        due = [part for part, every in used.items() if step % every == 0]
        return [taken(part, round(BATCH[part] * share), generator) for part in due]

    def taken(part: str, size: int, generator: Generator) -> Batch:
        which, x, ids = sets[part].draw(size, generator)
        if not options.taught or part == "small":  # of those nothing was noted
            return noised(x, ids, generator)
        ids, attention = lesson(which, ids, generator)
        return noised(x, ids, generator) | {"shown": attention}

    def measure() -> dict[str, float]:
        # Binning would generate at 256 pixels, the smallest size that PixArt's own table has, and shrink the result.
        pipe = pipeline(module, words, torch.float32)
        page = samples(pipe, PROMPTS[:COLUMNS], steps=10, use_resolution_binning=False, clean_caption=False)
        page.save(options.runs / f"{name}.png")
        return validation(module, sets["validation"])

    def publish() -> None:
        export(pipeline(module, words, torch.float16), FOLDER / name)

    train(Task(name, module, batches, measure, publish, SEED, size.rate), options)


if __name__ == "__main__":
    main()
