# The whole denoiser of the embedded model learns, ten times slower than the head.
_base_ = ["embedded_practical_upernet.py"]
model = dict(backbone=dict(tune="full"))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"backbone.fx": dict(lr_mult=0.1)}))
find_unused_parameters = True  # layers behind the last activation do not run
