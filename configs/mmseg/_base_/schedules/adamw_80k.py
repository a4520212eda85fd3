# AdamW for 80k steps of two images, as in arXiv 2410.03558, with a learning rate that goes down to nothing.
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1.6e-4, weight_decay=1e-3))
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=80000, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=80000, val_interval=2000)
