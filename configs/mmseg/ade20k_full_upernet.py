# SDXL and Playground v2 side by side, frozen: the largest setting (XL-t) of arXiv 2410.03558, on ADE20K.
_base_ = ["_base_/ade20k_upernet.py"]
shared = dict(type="DiffusionBackbone", variant="fp16", activations="full", t=50, prompt=_base_.prompt, size=1024)
model = dict(
    backbone=dict(
        _delete_=True,
        type="DiffusionBackbones",
        backbones=[
            dict(model="stabilityai/stable-diffusion-xl-base-1.0", **shared),
            dict(model="playgroundai/playground-v2-1024px-aesthetic", **shared),
        ],
        projection=dict(channels=256, norm=dict(type="GN", num_groups=32)),
    )
)
