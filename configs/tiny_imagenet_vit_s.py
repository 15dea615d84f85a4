"""Tiny-ImageNet: Aether-ViT-S on 100,000 colour images of 64 x 64 in 200 classes.

What:     12 ⵟ blocks of width 384 on patches of 8 x 8, no normalisation layer; 200 epochs of 256 images, random
          resized crops, RandAugment, MixUp and CutMix, as a ViT needs them.
Command:  python -m launch.train --config=configs/tiny_imagenet_vit_s.py --config.data.path=tiny-imagenet-200/
Baseline: the same with --config.model.kind=vit --workdir=runs/tiny_imagenet_vit
Data:     the folder as it is downloaded: `train/CLASS/images/`, and `val/` with its list of classes.
Small:    --config.model.size=ti --config.model.layers=6 --config.model.width=96 trains on a CPU.
Time:     not measured yet: no accelerator was at hand.
Result:   not measured yet; a small one on a subset of CIFAR-10 errs on 43.8 ± 0.4 %, ViT on 54.4 ± 0.2 % (LOG.md).
"""

from ml_collections import ConfigDict

from aether.config import default_config


def get_config() -> ConfigDict:
    """Return the settings of this run; `data.path` is left for the command line."""
    config = default_config()
    config.model.kind = "aether_vit"
    config.model.size = "s"
    config.model.dropout = 0.1
    config.model.dtype = "bfloat16"
    config.data.path = ""
    config.data.batch_size = 256
    config.data.workers = 8
    config.data.prefetch = 16
    config.image.size = 64
    config.image.crop = "resized"
    config.image.flip = True
    config.image.randaugment = 2
    config.image.mixup = 0.8
    config.image.cutmix = 1.0
    config.image.label_smoothing = 0.1
    config.optim.weight_decay = 0.05
    config.optim.warmup_steps = 4000
    config.train.steps = 78_000
    config.train.eval_every = 3900
    config.train.log_every = 50
    config.checkpoint.every = 3900
    return config
