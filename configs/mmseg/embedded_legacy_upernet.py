# The same with the legacy activations.
_base_ = ["embedded_practical_upernet.py"]
model = dict(backbone=dict(activations="legacy"))
