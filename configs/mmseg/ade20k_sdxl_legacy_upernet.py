# The same with the legacy activations.
_base_ = ["ade20k_sdxl_practical_upernet.py"]
model = dict(backbone=dict(activations="legacy"))
