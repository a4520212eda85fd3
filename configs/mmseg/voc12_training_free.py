# Pascal VOC 2012, validation, 20 classes and background.
# Every image is told every class; no figure of the paper is made this way. For another model:
# --cfg-options model.model=stabilityai/stable-diffusion-xl-base-1.0
_base_ = ["_base_/models/training_free.py", "_base_/runtime.py"]
names = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog"]
names = [*names, "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor"]
model = dict(
    classes=names,
    background=["sky", "grass", "tree", "wall", "floor", "road", "water", "building"],
)
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
        type="PascalVOCDataset",
        data_root="data/VOCdevkit/VOC2012",
        data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
        ann_file="ImageSets/Segmentation/val.txt",
        pipeline=test_pipeline,
    ),
)
test_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
val_cfg = None
