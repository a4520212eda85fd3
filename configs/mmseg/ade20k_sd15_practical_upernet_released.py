# Trained as the released code does, whose t=50 is the timestep 51. Compare ade20k_sd15_practical_upernet.py.
_base_ = ["_base_/ade20k_upernet_released.py"]
sd15 = dict(model="stable-diffusion-v1-5/stable-diffusion-v1-5", variant="fp16", size=512)
model = dict(
    backbone=dict(**sd15, activations="practical", t=51),
    decode_head=dict(in_channels=[2560, 640, 320]),
    auxiliary_head=dict(in_channels=640),
)
