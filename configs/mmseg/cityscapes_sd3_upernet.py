# Stable Diffusion 3.5 medium, frozen, on Cityscapes.
# The blocks are spread over the depth; no paper has ranked them. Its grid has one size, so a small pyramid is made
# of it, as for plain vision transformers. t is 1000 sigma.
_base_ = ["_base_/cityscapes_upernet.py"]
norm_cfg = dict(type="GN", num_groups=32)
blocks = [["vit-block5-out"], ["vit-block9-out"], ["vit-block13-out"], ["vit-block17-out"]]
model = dict(
    backbone=dict(model="stabilityai/stable-diffusion-3.5-medium", dtype="bfloat16", levels=blocks, t=195, size=1024),
    neck=dict(type="Feature2Pyramid", embed_dim=256, rescales=[4, 2, 1, 0.5], norm_cfg=norm_cfg),
    decode_head=dict(in_channels=[256, 256, 256, 256], in_index=[0, 1, 2, 3], pool_scales=(1, 2, 3, 6)),
    auxiliary_head=dict(in_index=2),
)
