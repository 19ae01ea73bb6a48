"""UperNet on ADE20K from an exported ViT-B/16, with MILAN's settings: a configuration of MMSegmentation 1.x.

    student-export RUN -o student.pth --format torch
    python for_mmseg.py student.pth student-mmseg.pth
    mim train mmsegmentation upernet_milan_b.py --launcher pytorch --gpus 8

Of the paper: 512 pixels, 160,000 steps of 16 images, learning rate 3e-5, layer decay .9, weight decay .05, drop path .1, 1,500
steps of warm-up, then linear to 0. MMSegmentation's network for MAE: relative positions, a feature pyramid from blocks 4, 6,
8 and 12, and sliding windows in the test.
"""

_base_ = "mmseg::mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py"

model = dict(
    pretrained="student-mmseg.pth",
    # students are normalised by ImageNet's mean and deviation, in RGB: these are them times 255
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(drop_path_rate=0.1),
)
optim_wrapper = dict(
    optimizer=dict(lr=3e-5, weight_decay=0.05),
    paramwise_cfg=dict(num_layers=12, layer_decay_rate=0.9),
)
train_dataloader = dict(batch_size=2)  # on each of 8 GPUs
