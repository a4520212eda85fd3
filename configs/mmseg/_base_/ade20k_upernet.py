# UPerNet on ADE20K, and how arXiv 2410.03558 prompts for it; a config adds the frozen model below.
_base_ = [
    "models/upernet.py",
    "datasets/ade20k.py",
    "schedules/adamw_80k.py",
    "runtime.py",
]
prompt = (
    "a highly realistic photo of the real world. It can be an indoor scene, or an outdoor scene, or a photo of "
    "nature. high quality."
)
data_preprocessor = dict(size=(512, 512), size_divisor=None)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(prompt=prompt),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(512, 512)),
)
