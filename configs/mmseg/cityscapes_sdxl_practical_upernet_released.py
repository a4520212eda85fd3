# Trained as the released code does. Compare cityscapes_sdxl_practical_upernet.py.
_base_ = ["_base_/cityscapes_upernet_released.py"]
sdxl = dict(model="stabilityai/stable-diffusion-xl-base-1.0", variant="fp16", size=1024)
model = dict(
    backbone=dict(**sdxl, activations="practical", t=50),
    decode_head=dict(in_channels=[2560, 1280], in_index=[1, 0], pool_scales=(1, 2)),
    auxiliary_head=dict(in_channels=1280, in_index=0),
)
