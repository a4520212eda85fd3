# In the manner of VPD (arXiv 2303.02153), as arXiv 2410.03558 compares with it: block outputs of a frozen Stable
# Diffusion 1.5, and a text embedding that learns. On Cityscapes.
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
        activations=["up-level0-repeat1-res-out", "up-level1-repeat1-vit-out", "up-level2-repeat1-vit-out"],
        t=50,
        prompt=prompt,
        learn_prompt=True,
        size=512,
    ),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
    test_cfg=dict(mode="slide", crop_size=(1024, 1024), stride=(512, 512)),
)
