# A thousand steps: minutes on a CPU.
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3, weight_decay=1e-3))
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=1000, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=1000, val_interval=250)
