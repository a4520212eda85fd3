# Nothing is trained: class names are looked for by attention (arXiv 2603.06178).
model = dict(
    type="TrainingFreeSegmentor",
    model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    data_preprocessor=dict(
        type="SegDataPreProcessor", mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], bgr_to_rgb=True
    ),
)
