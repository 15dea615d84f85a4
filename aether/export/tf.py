"""To TensorFlow: a SavedModel of any batch and, for texts, any length up to the context, run without the model's code.

The graph is traced from keras_model.py on Keras' TensorFlow backend. bfloat16 parameters are bfloat16 in it;
computing is in float32.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from aether.export import keras
from aether.export.source import Target

_SAVED = "saved_model"


def finish(folder: Path) -> None:
    """Write the SavedModel; its signature takes `inputs` and gives `logits`."""
    import tensorflow as tf
    from keras.export import ExportArchive

    network, facts = keras.network_of(folder)
    side = facts.get("image_size")
    takes = ([None, side, side, facts["channels"]], tf.float32) if side else ([None, None], tf.int32)
    archive = ExportArchive()
    archive.track(network)
    archive.add_endpoint(
        "serve", lambda inputs: {"logits": network(inputs, training=False)}, [tf.TensorSpec(*takes, name="inputs")]
    )
    archive.write_out(str(folder / _SAVED), verbose=False)


def replay(folder: Path, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the logits of each batch."""
    import tensorflow as tf

    network = tf.saved_model.load(str(folder / _SAVED))
    for x in batches:
        yield network.signatures["serving_default"](inputs=tf.constant(x))["logits"].numpy()


TARGET = Target(
    "a TensorFlow SavedModel",
    keras.write,
    replay,
    finish=finish,
    packages=("tensorflow", "keras"),
    extra="tf",
    environment={"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"},
    use="import tensorflow as tf\n\n"
    f'network = tf.saved_model.load("{_SAVED}")\n'
    'logits = network.signatures["serving_default"](inputs=tf.constant(inputs))["logits"]',
)
