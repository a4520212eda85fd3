# The same with the legacy activations.
_base_ = ["ade20k_sd15_practical_upernet.py"]
model = dict(backbone=dict(activations="legacy"))
