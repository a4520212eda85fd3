# Pascal Context, validation, 59 classes.
# For another model: --cfg-options model.model=stabilityai/stable-diffusion-xl-base-1.0
_base_ = ["_base_/training_free.py"]
model = dict(classes="PascalContextDataset59")
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
dataset = dict(
    type="PascalContextDataset59",
    data_root="data/VOCdevkit/VOC2010",
    data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClassContext"),
    ann_file="ImageSets/SegmentationContext/val.txt",
    pipeline=test_pipeline,
)
test_dataloader = dict(dataset=dataset)
