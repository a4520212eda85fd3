# Trained as the released code does. Compare ade20k_sdxl_legacy_upernet.py.
_base_ = ["ade20k_sdxl_practical_upernet_released.py"]
model = dict(
    backbone=dict(activations="legacy"),
    decode_head=dict(in_channels=[1280, 960]),
    auxiliary_head=dict(in_channels=960),
)
