# The attention of the embedded model learns by low-rank adapters.
_base_ = ["embedded_practical_upernet.py"]
model = dict(backbone=dict(tune=dict(type="lora", r=8, alpha=8)))
find_unused_parameters = True  # layers behind the last activation do not run
