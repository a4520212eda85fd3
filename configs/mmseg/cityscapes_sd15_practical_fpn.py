# Stable Diffusion 1.5, frozen, with the practical activations of arXiv 2410.03558, and Semantic FPN, on Cityscapes.
_base_ = ["_base_/cityscapes_fpn.py"]
sd15 = dict(model="stable-diffusion-v1-5/stable-diffusion-v1-5", variant="fp16", size=512)
model = dict(backbone=dict(**sd15, activations="practical", t=50))
