"""ImageNet: AetherResNet-50 with the usual recipe of 100 epochs, for a slice of TPUs or a machine with GPUs.

What:     bottleneck blocks 3, 4, 6, 3, widths 256 to 2048 (25.5 million parameters); 1.28 million images at 224 x 224,
          1024 a step, random resized crops, mirroring, label smoothing.
Prepare:  TFDS's imagenet2012 as ArrayRecord, from the archives that you have been given access to.
Command:  python -m launch.train --config=configs/imagenet_resnet50.py
Plan:     python -m launch.plan --config=configs/imagenet_resnet50.py --topology=v5e:4x4 --config.image.size=224 \
              --config.model.classes=1000
Baseline: the same with --config.model.kind=resnet --workdir=runs/imagenet_resnet50_baseline
Memory:   the 32 processes hold up to 128 batches, 20 GB over all hosts; fewer data.workers hold less.
Time:     not measured yet: no accelerator was at hand.
Result:   not measured yet.
"""

from ml_collections import ConfigDict

from aether.config import default_config


def get_config() -> ConfigDict:
    """Return the settings of this run."""
    config = default_config()
    config.model.kind = "aether_resnet"
    config.model.size = "50"
    config.model.stem = "imagenet"
    config.model.dtype = "bfloat16"
    config.data.path = "tfds:imagenet2012"
    config.data.batch_size = 1024
    config.data.workers = 32
    config.data.prefetch = 32
    config.image.size = 224
    config.image.channels = 3
    config.image.crop = "resized"
    config.image.min_scale = 0.08
    config.image.flip = True
    config.image.label_smoothing = 0.1
    config.optim.weight_decay = 0.05
    config.optim.warmup_steps = 6250
    config.train.steps = 125_000
    config.train.eval_every = 6250
    config.train.log_every = 50
    config.checkpoint.every = 1250
    return config
