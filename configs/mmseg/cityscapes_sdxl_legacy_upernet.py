# The same with the legacy activations.
_base_ = ["cityscapes_sdxl_practical_upernet.py"]
model = dict(backbone=dict(activations="legacy"))
