# The same with the legacy activations.
_base_ = ["cityscapes_sd15_practical_upernet.py"]
model = dict(backbone=dict(activations="legacy"))
