# Pascal VOC 2012, validation, 20 classes and background.
# For another model: --cfg-options model.model=stabilityai/stable-diffusion-xl-base-1.0
_base_ = ["_base_/training_free.py"]
model = dict(
    classes="PascalVOCDataset",
    background=["sky", "grass", "tree", "wall", "floor", "road", "water", "building"],
)
dataset = dict(
    type="PascalVOCDataset",
    data_root="data/VOCdevkit/VOC2012",
    data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
    ann_file="ImageSets/Segmentation/val.txt",
)
test_dataloader = dict(dataset=dataset)
