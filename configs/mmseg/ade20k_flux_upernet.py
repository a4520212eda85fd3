# Flux.1 dev, frozen, on ADE20K. All else as for Stable Diffusion 3.5, its blocks spread over the depth too.
_base_ = ["ade20k_sd3_upernet.py"]
blocks = [["vit-block9-out"], ["vit-block18-out"], ["vit-block27-out"], ["vit-block36-out"]]
model = dict(backbone=dict(model="black-forest-labs/FLUX.1-dev", levels=blocks))
