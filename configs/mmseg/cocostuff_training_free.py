# COCO-Stuff, validation, 171 classes.
# Every image is told every class; no figure of the paper is made this way. For another model:
# --cfg-options model.model=stabilityai/stable-diffusion-xl-base-1.0
_base_ = ["_base_/models/training_free.py", "_base_/runtime.py"]
model = dict(classes="COCOStuffDataset")
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
test_dataloader = dict(
    batch_size=1,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="COCOStuffDataset",
        data_root="data/coco_stuff164k",
        data_prefix=dict(img_path="images/val2017", seg_map_path="annotations/val2017"),
        pipeline=test_pipeline,
    ),
)
test_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
val_cfg = None
