# cityscapes_upernet.py as the released code of arXiv 2410.03558 trains: levels from coarse to fine, no projection (its
# residual blocks begin at zero and stay there), padding learnt as class 1, and a learning rate that stops at 1e-4.
_base_ = ["cityscapes_upernet.py"]
norm_cfg = dict(_delete_=True, type="SyncBN", requires_grad=True)
data_preprocessor = dict(seg_pad_val=1)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(projection=None),
    decode_head=dict(in_index=[2, 1, 0], norm_cfg=norm_cfg),
    auxiliary_head=dict(in_index=1, norm_cfg=norm_cfg),
)
param_scheduler = [dict(type="PolyLR", eta_min=1e-4, power=0.9, begin=0, end=80000, by_epoch=False)]
