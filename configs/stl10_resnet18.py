"""STL-10: AetherResNet-18 on 5,000 colour images of 96 x 96, few and large.

What:     18 layers, widths 64 to 512, a 3 x 3 stem with stride 2; 400 epochs of 64 images, random resized crops,
          mirroring, colour jitter, Cutout. The 8,000 images of the test split validate.
Prepare:  python -c "import tensorflow_datasets as tfds; tfds.builder('stl10', file_format='array_record')\
              .download_and_prepare()"
Command:  python -m launch.train --config=configs/stl10_resnet18.py
Baseline: the same with --config.model.kind=resnet --workdir=runs/stl10_resnet18_baseline
Time:     not measured yet: no accelerator was at hand.
Result:   not measured yet.
"""

from ml_collections import ConfigDict

from aether.config import default_config


def get_config() -> ConfigDict:
    """Return the settings of this run."""
    config = default_config()
    config.model.kind = "aether_resnet"
    config.model.size = "18"
    config.model.stem = "stride2"
    config.model.dtype = "bfloat16"
    config.data.path = "tfds:stl10"
    config.data.batch_size = 64
    config.data.workers = 8
    config.data.prefetch = 16
    config.image.crop = "resized"
    config.image.min_scale = 0.3
    config.image.flip = True
    config.image.jitter = 0.3
    config.image.cutout = 24
    config.image.label_smoothing = 0.1
    config.optim.weight_decay = 0.1
    config.optim.warmup_steps = 1000
    config.train.steps = 31_200
    config.train.eval_every = 1560
    config.train.log_every = 50
    config.checkpoint.every = 1560
    return config
