# SDXL, frozen, with the practical activations of arXiv 2410.03558, and UPerNet on two levels, on ADE20K.
_base_ = ["_base_/ade20k_upernet.py"]
sdxl = dict(model="stabilityai/stable-diffusion-xl-base-1.0", variant="fp16", size=1024)
model = dict(
    backbone=dict(**sdxl, activations="practical", t=50),
    decode_head=dict(in_channels=[256, 256], in_index=[0, 1], pool_scales=(1, 2)),
)
