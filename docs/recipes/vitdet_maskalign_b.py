"""ViTDet's Mask R-CNN on COCO from an exported ViT-B/16, with MaskAlign's settings: a LazyConfig of Detectron2.

    student-export RUN -o student.pth --format torch
    python tools/lazyconfig_train_net.py --config-file vitdet_maskalign_b.py --num-gpus 8 \
        train.init_checkpoint="student.pth?matching_heuristics=True"

Of the paper: 1024 pixels, learning rate 3e-4, layer decay .8, 25 epochs, batch 64. Where it is silent, ViTDet's own: AdamW with
weight decay .1, drop path .1, large-scale jitter .1 to 2, steps at 8/9 and 26/27 of the way, 250 steps of warm-up.
"""

from functools import partial

import detectron2.data.transforms as T
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

IMAGE_SIZE, BATCH, EPOCHS, N_IMAGES = 1024, 64, 25, 118_000

model = model_zoo.get_config(
    "common/models/mask_rcnn_vitdet.py"
).model  # ViT-B/16, 12 heads; RGB by ImageNet's mean and deviation
model.backbone.net.drop_path_rate = 0.1

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.total_batch_size = BATCH
dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.recompute_boxes = True
dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(horizontal=True),
    L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=IMAGE_SIZE, target_width=IMAGE_SIZE),
    L(T.FixedSizeCrop)(crop_size=(IMAGE_SIZE, IMAGE_SIZE), pad=False),
]
dataloader.test.mapper.image_format = "RGB"
dataloader.test.mapper.augmentations = [L(T.ResizeShortestEdge)(short_edge_length=IMAGE_SIZE, max_size=IMAGE_SIZE)]

train = model_zoo.get_config("common/train.py").train
train.amp.enabled = True
train.ddp.fp16_compression = True
train.init_checkpoint = "student.pth?matching_heuristics=True"
train.max_iter = EPOCHS * N_IMAGES // BATCH

optimizer = model_zoo.get_config("common/optim.py").AdamW  # weight decay .1
optimizer.lr = 3e-4
optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, num_layers=12, lr_decay_rate=0.8)
optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01],
        milestones=[train.max_iter * 8 // 9, train.max_iter * 26 // 27],
        num_updates=train.max_iter,
    ),
    warmup_length=250 / train.max_iter,
    warmup_factor=0.001,
)
