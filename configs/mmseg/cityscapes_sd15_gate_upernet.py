# GATE (arXiv 2410.06719) on Cityscapes: features of Stable Diffusion 1.5 under the prompt alone, and twice under the
# image's own edges and a LoRA, mixed by weights that are learnt. The LoRAs are yours to train, on about thirty images
# of the domain: one good, and one slightly over-fitted.
_base_ = ["_base_/cityscapes_upernet.py"]
canny = dict(type="ControlNet", model="lllyasviel/sd-controlnet-canny", condition="canny")
good = dict(type="LoRA", source="data/loras/cityscapes_good.safetensors")
over = dict(type="LoRA", source="data/loras/cityscapes_over.safetensors")
model = dict(
    backbone=dict(
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        variant="fp16",
        activations=["up-level0-upsampler-out", "up-level1-upsampler-out", "up-level2-upsampler-out"],
        t=50,
        size=512,
        amalgamate=dict(variants=[[], [canny, good], [canny, over]], how="assigned"),
    )
)
