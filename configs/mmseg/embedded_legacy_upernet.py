# The model and the images that ship with the package: trains on a CPU in minutes.
_base_ = [
    "_base_/models/upernet.py",
    "_base_/datasets/embedded.py",
    "_base_/schedules/embedded_1k.py",
    "_base_/runtime.py",
]
norm_cfg = dict(type="GN", num_groups=8)
model = dict(
    backbone=dict(model="embedded", activations="legacy", projection=dict(channels=64, norm=norm_cfg)),
    decode_head=dict(in_channels=[64, 64, 64], channels=64, num_classes=18, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=64, channels=64, num_classes=18, norm_cfg=norm_cfg),
)
default_hooks = dict(checkpoint=dict(interval=250))
