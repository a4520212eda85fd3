# Stable Diffusion 3.5 medium, frozen, on Cityscapes.
# The blocks are spread over the depth; no paper has ranked them. Its grid has one size, so a small pyramid is made
# of it, as for plain vision transformers. t is 1000 sigma.
_base_ = [
    "_base_/models/upernet.py",
    "_base_/datasets/cityscapes.py",
    "_base_/schedules/adamw_80k.py",
    "_base_/runtime.py",
]
norm_cfg = dict(type="GN", num_groups=32)
prompt = (
    "An urban street scene with multiple lanes, various buildings, traffic lights, cars in the lanes, and "
    "pedestrians, highly realistic."
)
data_preprocessor = dict(size=(1024, 1024), size_divisor=None)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        model="stabilityai/stable-diffusion-3.5-medium",
        dtype="bfloat16",
        levels=[
            ["vit-block5-out"],
            ["vit-block9-out"],
            ["vit-block13-out"],
            ["vit-block17-out"],
        ],
        t=195,
        prompt=prompt,
        size=1024,
    ),
    neck=dict(type="Feature2Pyramid", embed_dim=256, rescales=[4, 2, 1, 0.5], norm_cfg=norm_cfg),
    decode_head=dict(in_channels=[256, 256, 256, 256], in_index=[0, 1, 2, 3], pool_scales=(1, 2, 3, 6), num_classes=19),
    auxiliary_head=dict(in_index=2, num_classes=19),
    test_cfg=dict(mode="slide", crop_size=(1024, 1024), stride=(512, 512)),
)
