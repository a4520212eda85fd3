# upernet.py for models with two levels.
_base_ = ["upernet.py"]
model = dict(decode_head=dict(in_channels=[256, 256], in_index=[0, 1], pool_scales=(1, 2)))
