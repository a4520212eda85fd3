# The embedded model's text embedding learns.
_base_ = ["embedded_practical_upernet.py"]
model = dict(backbone=dict(prompt="a photo of", learn_prompt=True))
