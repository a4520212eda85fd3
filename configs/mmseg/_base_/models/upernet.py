# UPerHead and its auxiliary head on three levels, as in arXiv 2410.03558. Group norms: the same on one GPU, on many
# and on a CPU.
_base_ = ["diffusion.py"]
norm_cfg = dict(type="GN", num_groups=32)
model = dict(
    backbone=dict(projection=dict(channels=256, norm=norm_cfg)),
    decode_head=dict(
        type="UPerHead",
        in_channels=[256, 256, 256],
        in_index=[0, 1, 2],
        pool_scales=(1, 2, 3),
        channels=512,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=[
            dict(type="CrossEntropyLoss", loss_weight=1.0),
            dict(type="LovaszLoss", reduction="none", loss_weight=1.0),
        ],
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=256,
        in_index=1,
        channels=512,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", loss_weight=0.4),
    ),
)
