# Flux.1 dev, frozen, on ADE20K.
# The blocks are spread over the depth; no paper has ranked them. Its grid has one size, so a small pyramid is made
# of it, as for plain vision transformers. t is 1000 sigma.
_base_ = [
    "_base_/models/upernet.py",
    "_base_/datasets/ade20k.py",
    "_base_/schedules/adamw_80k.py",
    "_base_/runtime.py",
]
norm_cfg = dict(type="GN", num_groups=32)
prompt = (
    "a highly realistic photo of the real world. It can be an indoor scene, or an outdoor scene, or a photo of "
    "nature. high quality."
)
data_preprocessor = dict(size=(512, 512), size_divisor=None)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        model="black-forest-labs/FLUX.1-dev",
        dtype="bfloat16",
        levels=[
            ["vit-block9-out"],
            ["vit-block18-out"],
            ["vit-block27-out"],
            ["vit-block36-out"],
        ],
        t=195,
        prompt=prompt,
        size=1024,
    ),
    neck=dict(type="Feature2Pyramid", embed_dim=256, rescales=[4, 2, 1, 0.5], norm_cfg=norm_cfg),
    decode_head=dict(in_channels=[256, 256, 256, 256], in_index=[0, 1, 2, 3], pool_scales=(1, 2, 3, 6)),
    auxiliary_head=dict(in_index=2),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(512, 512)),
)
