# Semantic FPN on three levels: a lighter head.
_base_ = ["diffusion.py"]
norm_cfg = dict(type="GN", num_groups=32)
model = dict(
    backbone=dict(projection=dict(channels=256, norm=norm_cfg)),
    neck=dict(type="FPN", in_channels=[256, 256, 256], out_channels=256, num_outs=3),
    decode_head=dict(
        type="FPNHead",
        in_channels=[256, 256, 256],
        in_index=[0, 1, 2],
        feature_strides=[8, 16, 32],
        channels=128,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", loss_weight=1.0),
    ),
)
