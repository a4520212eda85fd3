# Features of the embedded model without and with a few steps of denoising, mixed by weights that are learnt.
_base_ = ["embedded_practical_upernet.py"]
denoise = dict(type="Denoise", by=20, steps=2)
model = dict(backbone=dict(amalgamate=dict(variants=[[], [denoise]], how="assigned", sparsity=1e-3)))
