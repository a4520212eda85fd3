# The frozen model without a head: images in [-1, 1], levels from fine to coarse.
data_preprocessor = dict(
    type="SegDataPreProcessor",
    mean=[127.5, 127.5, 127.5],
    std=[127.5, 127.5, 127.5],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255,
    size_divisor=8,
)
model = dict(
    type="DiffusionEncoderDecoder",
    data_preprocessor=data_preprocessor,
    backbone=dict(type="DiffusionBackbone"),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
