# The embedded model labels the drawn world by attention alone. Every image is told every class.
_base_ = ["_base_/models/training_free.py", "_base_/datasets/embedded.py", "_base_/runtime.py"]
model = dict(model="embedded", classes="EmbeddedWorldDataset")
train_dataloader = val_dataloader = val_evaluator = val_cfg = None
