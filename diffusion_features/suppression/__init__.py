"""Content shift: techniques that suppress it, GATE to choose among them, and amalgamation of what they give.

Diffusion features drift from their image, because the denoiser imagines what the noise destroyed (arXiv 2410.06719).

>>> from diffusion_features.suppression import ControlNet, FineGrainedPrompt
>>> fx(photo, "a cat", suppress=[ControlNet("lllyasviel/sd-controlnet-canny"), FineGrainedPrompt("{prompt}, sharp")])
"""

from .applying import applied, asked, loaded
from .control import ControlNet
from .image_prompt import IPAdapter
from .lora import LoRA
from .prompt import FineGrainedPrompt
from .sharing import variants
from .spec import as_technique
from .steps import CFG, Denoise
from .technique import Call, Technique, guided

__all__ = [
    "CFG", "Call", "ControlNet", "Denoise", "FineGrainedPrompt", "IPAdapter", "LoRA", "Technique", "applied",
    "as_technique", "asked", "guided", "loaded", "variants",
]  # fmt: skip
