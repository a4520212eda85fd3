"""Which layers of a model are used, and at which timestep: the settings of arXiv 2603.06178."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from diffusion_features import FeatureExtractor


@dataclass(frozen=True)
class Preset:
    """Settings of one model.

    Attributes:
        cross: globs of the cross-attention maps that are added up.
        reference: id of the feature whose affinity tells how much a layer counts.
        refiners: ids of the self-attention maps that refine.
        k: how often they do.
        t: the timestep the denoiser is conditioned on.
        template: what is written around the list of names.
    """

    cross: tuple[str, ...]
    reference: str
    refiners: tuple[str, ...]
    k: int
    t: int
    template: str = "{}"


def _unet(layers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{place}-vit-{block}-self-map" for place, block in (layer.split() for layer in layers))


def _blocks(first: int, last: int, suffix: str) -> tuple[str, ...]:
    return tuple(f"vit-block{i}-{suffix}" for i in range(first, last + 1))


_SD15 = Preset(
    cross=("*-cross-map",),
    reference="up-level2-repeat1-vit-block0-cross-q",
    refiners=_unet(("up-level3-repeat0 block0", "up-level3-repeat1 block0", "down-level0-repeat1 block0")),
    k=2,
    t=101,  # what its scheduler makes of the released t=100
)
_SDXL = Preset(
    cross=("*-cross-map",),
    reference="up-level1-repeat0-vit-block0-cross-q",
    refiners=_unet((
        "up-level1-repeat0 block0", "up-level1-repeat0 block1", "up-level1-repeat1 block0", "up-level1-repeat1 block1",
        "up-level1-repeat2 block0", "down-level1-repeat0 block0", "down-level1-repeat0 block1",
    )),
    k=2,
    t=100,
)  # fmt: skip

PRESETS = {
    "sd15": _SD15,
    # mean IoU of 32 validation scenes (not refined: 0.727, once by this layer 0.724)
    "embedded": replace(_SD15, refiners=_unet(("up-level2-repeat2 block0",)), k=0),
    # by the same scenes (once 0.739, twice 0.731, not refined 0.688); the blocks were chosen with earlier weights
    "embedded-dit": Preset(("*-cross-map",), "vit-block5-cross-q", _blocks(4, 7, "self-map"), k=1, t=100),
    # likewise (once 0.623, twice 0.620, not refined 0.569)
    "embedded-dit-small": Preset(("*-cross-map",), "vit-block2-cross-q", ("vit-block3-self-map",), k=1, t=100),
    "sdxl": _SDXL,
    "pgv2": _SDXL,
    "pixart": Preset(("*-cross-map",), "vit-block13-cross-q", _blocks(10, 17, "self-map"), k=5, t=100),
    # the released t=100 of Hunyuan and t=150 of Flux are strengths; their schedulers make them these timesteps
    "hunyuan": Preset(_blocks(20, 29, "cross-map"), "vit-block25-cross-q", _blocks(20, 29, "self-map"), k=4, t=81),
    "flux": Preset(("*-cross-map",), "vit-block27-attn-out", ("vit-block12-self-map", "vit-block18-self-map"), 2, 407),
}


def preset_for(fx: FeatureExtractor) -> Preset:
    """The preset of a model: the paper's, or of another transformer the one ``like_published`` finds.

    Raises:
        ValueError: there is none for it.
    """
    model = "embedded" if fx.model_id == "embedded" else fx.family.preset_model(fx.denoiser, fx.model_id)
    found = PRESETS.get(str(model)) or like_published([a.id for a in fx.available])
    if found is None:
        raise ValueError(
            f"there is no preset to segment with {type(fx.pipe).__name__}; there are {', '.join(PRESETS)}, and any "
            "transformer: give a Preset that names the layers of this model"
        )
    return found


def like_published(ids: Sequence[str]) -> Preset | None:
    """The paper's settings for a transformer that it does not have; none for what is no transformer.

    Not published: the blocks are those at the places where Flux.1's are among its 57, if image and text are attended to
    together, and else PixArt's among its 28. PixArt's noise at t = 100 is that of flow matching at 255.
    """

    def at(kind: str, block: int, of: int) -> str:
        blocks = [id for id in ids if re.fullmatch(rf"vit-block\d+-{kind}", id)]
        return blocks[min(round(block * len(blocks) / of), len(blocks) - 1)]

    if "vit-block0-cross-map" not in ids:
        return None
    if "vit-block0-attn-out" in ids:
        refiners = dict.fromkeys((at("self-map", 12, 57), at("self-map", 18, 57)))
        return Preset(("*-cross-map",), at("attn-out", 27, 57), (*refiners,), k=2, t=407)
    return Preset(("*-cross-map",), at("cross-q", 13, 28), (), k=0, t=255)  # such as Sana: nothing there to refine by
