# Test the training-free segmentor on the files of a dataset. Every image is told every class; no figure of the paper is
# made this way.
_base_ = ["models/training_free.py", "runtime.py"]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
test_dataloader = dict(
    batch_size=1,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(pipeline=test_pipeline),
)
test_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
val_cfg = None
