"""To ONNX: the network in PyTorch, traced once, for any number of rows and, where it reads text, any length."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from aether.export.source import NOTES, Source, Target
from aether.export.torch import to_tensor, to_torch

MODEL = "model.onnx"
_OPSET = 18
_LARGE = 1_500_000_000  # bytes; a file of ONNX takes less than 2 GiB, and with more, arrays have one of their own


def write(source: Source, folder: Path) -> None:
    """Write model.onnx, in float32: parameters that were rounded stay so."""
    import torch

    from aether.export.reference import torch_model

    f = source.facts
    with torch.device("meta"):
        network = torch_model.network_of(f)
    arrays = to_torch(source.parameters)
    state = {name: torch.from_numpy(np.array(a, np.float32, order="C")) for name, a in arrays}
    network.load_state_dict(state, assign=True)
    network.eval()
    text = "vocab" in f
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=f.get("context"))
    side, channels = f.get("image_size"), f.get("channels")
    x = torch.zeros(2, f["context"], dtype=torch.int64) if text else torch.zeros(2, channels, side, side)
    torch.onnx.export(
        network,
        (x,),
        folder / MODEL,
        input_names=["inputs"],
        output_names=["logits"],
        dynamic_shapes=({0: batch, 1: length} if text else {0: batch},),
        opset_version=_OPSET,
        dynamo=True,
        external_data=sum(a.nbytes for a in state.values()) > _LARGE,
        verbose=False,
    )
    if source.dtype != "float32":
        said = f"The file has {source.dtype} parameters as float32 numbers of the same value.\n"
        (folder / NOTES).write_text(said, encoding="utf-8")


def replay(folder: Path, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the logits of each batch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / MODEL, providers=["CPUExecutionProvider"])
    for x in batches:
        (logits,) = session.run(["logits"], {"inputs": to_tensor(x).contiguous().numpy()})
        yield logits


TARGET = Target(
    "ONNX",
    write,
    replay,
    use=(
        "from onnxruntime import InferenceSession\n\n"
        'session = InferenceSession("model.onnx")\n'
        '(logits,) = session.run(None, {"inputs": inputs})  # ids as int64'
    ),
    packages=("torch", "safetensors", "onnx", "onnxruntime", "onnxscript"),
    extra="onnx",
    channels_first=True,
)
