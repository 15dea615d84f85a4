"""To and from GPT-2's own layout, which `transformers.GPT2LMHeadModel` and much else reads without code of ours.

There the linear maps of attention and MLP are (in, out), as here; query, key and value are one map, `c_attn`; the head
is the table of ids itself, and a scale that ours has goes into the norm before it.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aether.errors import InputError
from aether.export.source import FORMAT, Parameters, Source, Target
from aether.export.tensors import read_tensors, write_tensors
from aether.export.tokenizer import write_tokenizer
from aether.export.torch import WEIGHTS, to_tensor

_PARTS = dict(attention="dot", mlp="gelu", norm="layernorm", position="learned", head="tied", linear_bias=True)
_OUTER = {
    "embed.embedding": "wte.weight",
    "position.embedding": "wpe.weight",
    "norm.scale": "ln_f.weight",
    "norm.bias": "ln_f.bias",
}
_BLOCK = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attention.out": "attn.c_proj",
    "mlp.hidden": "mlp.c_fc",
    "mlp.out": "mlp.c_proj",
}
_QKV = ("query", "key", "value")
_LAST = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # masks, which old files have


def write(source: Source, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer.

    Raises:
      InputError: the network has a part that GPT-2 has not.
    """
    f = source.facts
    have = {key: f.get(key) for key in _PARTS}
    others = [f"{key}={have[key]}" for key, value in _PARTS.items() if have[key] != value]
    if f["family"] != "gpt" or others:
        what = ", ".join(others) or f"model.kind={f['kind']}"
        raise InputError(f"--to=gpt2 is for networks of GPT-2's parts, and this one has {what}; use --to=hf.")
    if f["embed_scale"] != 1.0:
        raise InputError(
            f"--to=gpt2 has no place for the scale of embeddings, {f['embed_scale']:.6g}, which model.embed_std has "
            "given this network; use --to=hf."
        )
    write_tensors(folder / WEIGHTS, _to_gpt2(source.parameters, f["layers"]))
    config = _config(source) | dict(network=f, aether=source.record)
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if source.tokenizer is not None:
        write_tokenizer(source.tokenizer, f, folder)


def _config(source: Source) -> dict[str, Any]:
    f, kind = source.facts, dict(model_type="gpt2", architectures=["GPT2LMHeadModel"])
    sizes = dict(vocab_size=f["vocab"], n_positions=f["context"], n_embd=f["width"], n_layer=f["layers"])
    sizes |= dict(n_head=f["heads"], n_inner=f["hidden"], layer_norm_epsilon=f["norm_epsilon"])
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    how = dict(activation_function="gelu_new", tie_word_embeddings=True, dtype=source.dtype, torch_dtype=source.dtype)
    eot = source.tokenizer.eot if source.tokenizer else None
    return kind | sizes | none | how | dict(bos_token_id=eot, eos_token_id=eot, pad_token_id=eot)


def _to_gpt2(parameters: Parameters, layers: int) -> Iterator[tuple[str, np.ndarray]]:
    for ours, theirs in _OUTER.items():
        yield f"transformer.{theirs}", parameters[ours]
    for k in range(layers):
        for last in ("kernel", "bias"):
            three = [parameters[f"blocks.{k}.attention.{part}.{last}"] for part in _QKV]
            yield f"transformer.h.{k}.attn.c_attn.{_LAST[last]}", np.concatenate(three, -1)
        for ours, theirs in _BLOCK.items():
            for last in ("scale" if ours.startswith("norm") else "kernel", "bias"):
                yield f"transformer.h.{k}.{theirs}.{_LAST[last]}", parameters[f"blocks.{k}.{ours}.{last}"]


def parameters_from_gpt2(folder: str | Path) -> tuple[dict[str, Any], Parameters]:
    """Read a folder that holds a GPT2LMHeadModel as safetensors.

    Returns:
      Facts, as of `aether.export.bundle.facts_of`, and the parameters by our names, mapped from the files.

    Raises:
      InputError: files are missing or damaged, or the network is not as GPT-2 has it.
    """
    folder = Path(folder)
    config = _read_config(folder)
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")) or [folder / WEIGHTS]:
        found |= {name.removeprefix("transformer."): a for name, a in read_tensors(file).items()}
    parameters: Parameters = {}
    try:
        parameters |= {ours: found.pop(theirs) for ours, theirs in _OUTER.items()}
        for k in range(config["n_layer"]):
            parameters |= _block(found, k)
    except KeyError as e:
        raise InputError(f"{folder} has no array {e.args[0]}, which a GPT-2 of its config.json has.") from e
    head = found.pop("lm_head.weight", None)
    if head is not None and not np.array_equal(head, parameters["embed.embedding"]):
        raise InputError(f"{folder} has a head of its own, lm_head.weight; GPT-2's is its table of ids.")
    extra = [name for name in found if not name.endswith(_BUFFERS)]
    if extra:
        raise InputError(f"{folder} has an array {extra[0]}, which GPT-2 has not.")
    return _facts(config, parameters), parameters


def _block(found: dict[str, np.ndarray], k: int) -> Parameters:
    block: Parameters = {}
    for last in ("kernel", "bias"):
        three = np.split(found.pop(f"h.{k}.attn.c_attn.{_LAST[last]}"), 3, -1)
        block |= {f"blocks.{k}.attention.{part}.{last}": a for part, a in zip(_QKV, three, strict=True)}
    for ours, theirs in _BLOCK.items():
        for last in ("scale" if ours.startswith("norm") else "kernel", "bias"):
            block[f"blocks.{k}.{ours}.{last}"] = found.pop(f"h.{k}.{theirs}.{_LAST[last]}")
    return block


def _read_config(folder: Path) -> dict[str, Any]:
    """Return config.json if it is of a GPT-2 that computes what ours does."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{file} cannot be read ({e}); give a folder of a GPT2LMHeadModel.") from e
    asked: dict[str, Any] = dict(model_type="gpt2", activation_function=("gelu_new", "gelu_pytorch_tanh"))
    asked |= dict(layer_norm_epsilon=1e-5, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    usual = dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True)
    usual |= dict(scale_attn_by_inverse_layer_idx=False, n_embd=768, n_layer=12, n_head=12, n_inner=None)
    config = usual | config
    for key, value in asked.items():
        if config.get(key) not in (value if isinstance(value, tuple) else (value,)):
            raise InputError(f"{file} has {key}={config.get(key)!r}; it must be {value!r}.")
    return config


def _facts(config: dict[str, Any], parameters: Parameters) -> dict[str, Any]:
    (vocab, width), context = parameters["embed.embedding"].shape, len(parameters["position.embedding"])
    hidden = parameters["blocks.0.mlp.hidden.kernel"].shape[1]
    facts = dict(format=FORMAT, family="gpt", kind="gpt2", norm_epsilon=config["layer_norm_epsilon"])
    facts |= dict(layers=config["n_layer"], heads=config["n_head"], width=width, hidden=hidden, vocab=vocab)
    return facts | _PARTS | dict(context=context, causal=True, embed_scale=1.0)


def read(folder: Path) -> Parameters | None:
    """Return the parameters of a folder of GPT-2's own layout; None of another."""
    return parameters_from_gpt2(folder)[1] if is_gpt2(folder) else None


def is_gpt2(folder: Path) -> bool:
    """Say whether a folder holds a GPT2LMHeadModel, exported or not."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == "gpt2"
    except (OSError, ValueError, AttributeError):
        return False


def replay(folder: Path, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the logits of each batch."""
    import torch
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(str(folder)).eval().float()
    with torch.inference_mode():
        for x in batches:
            yield model(to_tensor(x)).logits.numpy()


TARGET = Target(
    "GPT-2's own layout",
    write,
    replay,
    use=(
        "from transformers import GPT2LMHeadModel\n\n"
        'model = GPT2LMHeadModel.from_pretrained(".")\n'
        "logits = model(inputs).logits"
    ),
    packages=("torch", "safetensors", "transformers", "tokenizers"),
    extra="hf",
    environment={"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    read=read,
)
