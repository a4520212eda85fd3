"""What each way of loading only a part, or less of each number, saves on a Flux.1 with all its blocks.

    python benchmarks/loading.py [--heads N] [--json FILE]

Random weights in bfloat16 with the 57 blocks, the large text encoder's 24 layers and the proportions of the released
model, at a fraction of its width, are saved, and loaded in a fresh process each way. Counted are the bytes that the
loaded weights take, and how far the activation is from that of the whole model (the norm of the difference, relative).
int8 needs torchao. What offloading saves shows on a GPU only, and is not measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, PipelineQuantizationConfig, TorchAoConfig
from measure import in_fresh_process, machine, table
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from diffusion_features import FeatureExtractor
from tests.tiny_dits import build

ID, DEEP, PROMPT = "vit-block12-out", "vit-block28-out", "a cat"
WAYS: dict[str, dict[str, Any]] = {
    "everything": dict(activations="*"),
    "up to block 28": dict(activations=[ID, DEEP]),
    "up to block 12": dict(activations=[ID]),
    "everything, prompts known": dict(activations="*", prompts=PROMPT),
    "int8 of the denoiser": dict(activations="*"),
    "up to block 12, int8, prompts known": dict(activations=[ID], prompts=PROMPT),
}
"""Name → options of ``from_pretrained``; those with int8 in the name quantise too."""


def save(folder: Path, heads: int) -> None:
    """Flux.1's 24 heads of 128 channels become ``heads`` of 64; T5's 64 heads, a third more channels, shrink alike."""
    torch.manual_seed(0)
    told, pipe = 64 * heads * 4 // 3, build("flux_dev")
    pipe.transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=19, num_single_layers=38, attention_head_dim=64, num_attention_heads=heads,
        joint_attention_dim=told, pooled_projection_dim=pipe.text_encoder.config.hidden_size, guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    )  # fmt: skip
    depth = dict(num_layers=24, num_heads=told // 64, d_kv=64, feed_forward_proj="gated-gelu")
    pipe.text_encoder_2 = T5EncoderModel(
        T5Config(vocab_size=len(pipe.tokenizer_2), d_model=told, d_ff=told * 5 // 2, **depth)
    )
    pipe.to(torch.bfloat16).save_pretrained(folder)


def loaded(folder: str, way: str) -> tuple[dict[str, float], Tensor]:
    """MiB of the denoiser's, the text encoders' and all weights, and the activation."""
    options: dict[str, Any] = {"device": "cpu", "dtype": torch.bfloat16, **WAYS[way]}
    if "int8" in way:
        from torchao.quantization import Int8WeightOnlyConfig

        options["quantization_config"] = PipelineQuantizationConfig(
            quant_mapping={"transformer": TorchAoConfig(Int8WeightOnlyConfig())}
        )
    fx = FeatureExtractor.from_pretrained(folder, **options)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = fx(image, PROMPT, t=300, activations=ID)[ID].float()
    pipe = fx.pipe
    told = [part for part in (pipe.text_encoder, pipe.text_encoder_2) if part is not None]
    whole = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    sizes = {"denoiser": mib([fx.denoiser]), "text encoders": mib(told), "all": mib(whole)}
    return sizes, found


def mib(modules: list[nn.Module]) -> float:
    """Of all weights, each counted once."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(map(_bytes, tensors.values())) / 2**20


def _bytes(tensor: Any) -> int:
    """Of a quantised tensor, the bytes of the tensors that it is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return int(tensor.nbytes)


def main() -> None:
    """Print a table and, asked to, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--heads",
        type=int,
        default=9,
        metavar="N",
        help="of 64 channels, a multiple of 3; Flux.1 has 24 of 128 (default: 9)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    if options.heads < 3 or options.heads % 3:
        parser.error("--heads must be a multiple of 3, so that T5, a third wider, has whole heads")
    found: dict[str, dict[str, float]] = {}
    features: list[Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), options.heads)
        for way in WAYS:
            if "int8" in way and find_spec("torchao") is None:
                print(f"{way}: torchao is not installed", file=sys.stderr)
                continue
            found[way], feature = in_fresh_process(loaded, folder, way)
            features.append(feature)
            found[way]["off by"] = float((feature - features[0]).norm() / features[0].norm())
    whole = found["everything"]["all"]
    rows = [
        [way, *(f"{one[part]:.1f}" for part in ("denoiser", "text encoders", "all")), f"{one['all'] / whole:.0%}",
         f"{one['off by']:.1%}"]
        for way, one in found.items()
    ]  # fmt: skip
    print(table(["loaded", "denoiser, MiB", "text encoders, MiB", "all, MiB", "of everything", "off by"], rows))
    if options.json:
        about = {"machine": machine(), "heads": options.heads}
        options.json.write_text(json.dumps({**about, "ways": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
