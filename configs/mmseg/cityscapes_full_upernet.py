# SDXL and Playground v2 side by side, frozen: the largest setting (XL-t) of arXiv 2410.03558, on Cityscapes.
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
shared = dict(type="DiffusionBackbone", variant="fp16", activations="full", t=50, prompt=prompt, size=1024)
data_preprocessor = dict(size=(1024, 1024), size_divisor=None)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        _delete_=True,
        type="DiffusionBackbones",
        backbones=[
            dict(model="stabilityai/stable-diffusion-xl-base-1.0", **shared),
            dict(model="playgroundai/playground-v2-1024px-aesthetic", **shared),
        ],
        projection=dict(channels=256, norm=dict(type="GN", num_groups=32)),
    ),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
    test_cfg=dict(mode="slide", crop_size=(1024, 1024), stride=(512, 512)),
)
