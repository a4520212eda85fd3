# COCO-Stuff, validation, 171 classes.
# For another model: --cfg-options model.model=stabilityai/stable-diffusion-xl-base-1.0
_base_ = ["_base_/training_free.py"]
model = dict(classes="COCOStuffDataset")
dataset = dict(
    type="COCOStuffDataset",
    data_root="data/coco_stuff164k",
    data_prefix=dict(img_path="images/val2017", seg_map_path="annotations/val2017"),
)
test_dataloader = dict(dataset=dataset)
