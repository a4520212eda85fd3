# Trained as the released code does, whose t=50 is the timestep 51. Compare ade20k_sd15_legacy_upernet.py.
_base_ = ["ade20k_sd15_practical_upernet_released.py"]
model = dict(
    backbone=dict(activations="legacy"),
    decode_head=dict(in_channels=[1280, 1280, 960]),
    auxiliary_head=dict(in_channels=1280),
)
