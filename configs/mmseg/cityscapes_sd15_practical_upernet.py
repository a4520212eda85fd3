# Stable Diffusion 1.5, frozen, with the practical activations of arXiv 2410.03558, and UPerNet, on Cityscapes.
_base_ = [
    "_base_/models/upernet.py",
    "_base_/datasets/cityscapes.py",
    "_base_/schedules/adamw_80k.py",
    "_base_/runtime.py",
]
prompt = (
    "An urban street scene with multiple lanes, various buildings, traffic lights, cars in the lanes, and "
    "pedestrians, highly realistic."
)
data_preprocessor = dict(size=(1024, 1024), size_divisor=None)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        variant="fp16",
        activations="practical",
        t=50,
        prompt=prompt,
        size=512,
    ),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
    test_cfg=dict(mode="slide", crop_size=(1024, 1024), stride=(512, 512)),
)
