# Augmented, and yet cached: each image has four views that never change.
_base_ = ["embedded_cached_upernet.py"]
augment = [
    dict(type="RandomResize", scale=(128, 128), ratio_range=(1.0, 1.5)),
    dict(type="RandomCrop", crop_size=(128, 128)),
    dict(type="RandomFlip", prob=0.5),
]
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="CheckLabels", num_classes=18),
    dict(type="FixedViews", views=4, transforms=augment),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
