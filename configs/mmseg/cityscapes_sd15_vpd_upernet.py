# In the manner of VPD (arXiv 2303.02153), as arXiv 2410.03558 compares with it: block outputs of a frozen Stable
# Diffusion 1.5, and a text embedding that learns. On Cityscapes, where attention to the 77 words is a level more.
_base_ = ["_base_/cityscapes_upernet.py"]
model = dict(
    backbone=dict(
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        activations=["vpd", "attn"],
        attention=["down_cross", "up_cross"],
        t=50,
        learn_prompt=True,
        size=512,
    ),
    decode_head=dict(in_channels=[256, 256, 256, 256], in_index=[0, 1, 2, 3]),
)
