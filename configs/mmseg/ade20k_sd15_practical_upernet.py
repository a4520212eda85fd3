# Stable Diffusion 1.5, frozen, with the practical activations of arXiv 2410.03558, and UPerNet, on ADE20K.
_base_ = [
    "_base_/models/upernet.py",
    "_base_/datasets/ade20k.py",
    "_base_/schedules/adamw_80k.py",
    "_base_/runtime.py",
]
prompt = (
    "a highly realistic photo of the real world. It can be an indoor scene, or an outdoor scene, or a photo of "
    "nature. high quality."
)
data_preprocessor = dict(size=(512, 512), size_divisor=None)
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
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(512, 512)),
)
