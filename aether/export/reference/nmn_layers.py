"""The ⵟ layers of a network that Aether trained, as layers of nmn (AGPL-3.0). Needs this folder, numpy, nmn, and torch.

layers = load("."); y = layers["blocks.0.mlp.hidden"](x)     # (..., d) -> (..., units)
layers = load(".", "torch")                                  # the same by nmn.torch

layers.json says how nmn's constructors are called; nnx.npz and torch.npz are the states, by the names that these have.
A layer's `parts` are nmn's own modules, one but for attention: nmn has one α and one ε for all heads, so that each head
is a layer of its own, and their results are added. nmn.nnx computes in float64 where JAX_ENABLE_X64=1 is set, but for
its YatNMN (0.3.5), which is float32 whatever it is told.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray


def load(folder: str, framework: str = "nnx", dtype: str = "float64") -> dict[str, "Layer"]:
    """Return the layers by their names in the network; those that nmn does not have are in layers.json."""
    described = json.loads((Path(folder) / "layers.json").read_text(encoding="utf-8"))["layers"]
    with np.load(Path(folder) / f"{framework}.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    found = {}
    for name, made in ((name, entry[framework]) for name, entry in described.items() if framework in entry):
        states = [
            {key.removeprefix(f"{name}/{k}/"): a for key, a in arrays.items() if key.startswith(f"{name}/{k}/")}
            for k in range(made["parts"])
        ]
        make = of_torch if framework == "torch" else of_nnx
        found[name] = Layer(framework, made, [make(made["class"], made["options"], state, dtype) for state in states])
    return found


def of_nnx(name: str, options: dict[str, Any], state: dict[str, Array], dtype: str) -> Any:
    """Return a layer of nmn.nnx with a state."""
    import jax.numpy as jnp
    import nmn.nnx
    from flax import nnx

    options = {k: tuple(map(tuple, v)) if k == "padding" else v for k, v in options.items()}
    layer = getattr(nmn.nnx, name)(**options, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    flat = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(nnx.state(layer))}
    found = [(flat[key][0], flat[key][1].replace(jnp.asarray(a, dtype))) for key, a in state.items()]
    nnx.update(layer, nnx.from_flat_state(found))
    return layer


def of_torch(name: str, options: dict[str, Any], state: dict[str, Array], dtype: str) -> Any:
    """Return a layer of nmn.torch with a state."""
    import nmn.torch
    import torch

    wide = getattr(torch, dtype)
    layer = getattr(nmn.torch, name)(**options, dtype=wide, param_dtype=wide)
    layer.load_state_dict({k: torch.tensor(a, dtype=wide) for k, a in state.items()})
    return layer.eval()


class Layer:
    """Modules of nmn whose results are added; `layer(x)` takes and gives arrays, channels last."""

    def __init__(self, framework: str, made: dict[str, Any], parts: list[Any]):
        self.framework, self.parts = framework, parts
        self.convolution, self.causal = "Conv" in made["class"], made.get("causal", False)

    def __call__(self, x: Array) -> Array:
        """Return what the layer makes of x."""
        if self.framework == "torch":
            return self._torch(x)
        mask = dict(mask=np.tri(x.shape[1], dtype=bool)[None, None]) if self.causal else {}
        return np.sum([part(x, **mask) for part in self.parts], 0)

    def _torch(self, x: Array) -> Array:
        import torch

        (part,) = self.parts
        x = np.moveaxis(x, -1, 1) if self.convolution else x
        with torch.no_grad():
            y = part(torch.tensor(np.ascontiguousarray(x), dtype=next(part.parameters()).dtype)).numpy()
        return np.moveaxis(y, 1, -1) if self.convolution else y
