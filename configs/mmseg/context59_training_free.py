# Pascal Context, validation, 59 classes.
# Every image is told every class; no figure of the paper is made this way. For another model:
# --cfg-options model.model=stabilityai/stable-diffusion-xl-base-1.0
_base_ = ["_base_/models/training_free.py", "_base_/runtime.py"]
model = dict(classes="PascalContextDataset59")
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
test_dataloader = dict(
    batch_size=1,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="PascalContextDataset59",
        data_root="data/VOCdevkit/VOC2010",
        data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClassContext"),
        ann_file="ImageSets/SegmentationContext/val.txt",
        pipeline=test_pipeline,
    ),
)
test_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
val_cfg = None
