# In the manner of VPD (arXiv 2303.02153), as arXiv 2410.03558 compares with it: block outputs of a frozen Stable
# Diffusion 1.5, and a text embedding that learns. On ADE20K.
_base_ = ["_base_/ade20k_upernet.py"]
model = dict(
    backbone=dict(
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        activations="vpd",
        t=50,
        learn_prompt=True,
        size=512,
    )
)
