"""As vitdet_maskalign_b.py, with MR-MAE's settings: learning rate 2e-4, batch 16, 25 epochs, layer decay .8."""

from .vitdet_maskalign_b import EPOCHS, N_IMAGES, dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

BATCH = 16

dataloader.train.total_batch_size = BATCH
optimizer.lr = 2e-4
train.max_iter = EPOCHS * N_IMAGES // BATCH
lr_multiplier.scheduler.num_updates = train.max_iter
lr_multiplier.scheduler.milestones = [train.max_iter * 8 // 9, train.max_iter * 26 // 27]
lr_multiplier.warmup_length = 250 / train.max_iter
