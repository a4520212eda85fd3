# Trained as the released code does. Compare cityscapes_sdxl_legacy_upernet.py.
_base_ = ["cityscapes_sdxl_practical_upernet_released.py"]
model = dict(
    backbone=dict(activations="legacy"),
    decode_head=dict(in_channels=[1280, 960]),
    auxiliary_head=dict(in_channels=960),
)
