# In the manner of VPD (arXiv 2303.02153), as arXiv 2410.03558 compares with it: block outputs of a frozen Stable
# Diffusion 1.5, and a text embedding that learns. On ADE20K.
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
        activations=["up-level0-repeat1-res-out", "up-level1-repeat1-vit-out", "up-level2-repeat1-vit-out"],
        t=50,
        prompt=prompt,
        learn_prompt=True,
        size=512,
    ),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(512, 512)),
)
