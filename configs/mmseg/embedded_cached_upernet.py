# Features are computed once and kept, so nothing may change an image: no flips.
_base_ = ["embedded_practical_upernet.py"]
model = dict(backbone=dict(cache="data/embedded_features"))
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="CheckLabels", num_classes=18),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
