# UPerNet on Cityscapes, and how arXiv 2410.03558 prompts for it; a config adds the frozen model below.
_base_ = [
    "models/upernet.py",
    "datasets/cityscapes.py",
    "schedules/adamw_80k.py",
    "runtime.py",
]
prompt = (
    "An urban street scene with multiple lanes, various buildings, traffic lights, cars in the lanes, and "
    "pedestrians, highly realistic."
)
data_preprocessor = dict(size=(1024, 1024), size_divisor=None)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(prompt=prompt),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
    test_cfg=dict(mode="slide", crop_size=(1024, 1024), stride=(512, 512)),
)
