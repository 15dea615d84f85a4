"""To Hugging Face's transformers: configuration, weights, tokenizer and one file of code, made of two of ours."""

import ast
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aether.export.source import Parameters, Source, Target
from aether.export.tensors import read_tensors, write_tensors
from aether.export.tokenizer import write_tokenizer
from aether.export.torch import WEIGHTS, from_torch, to_tensor, to_torch

_REFERENCE = Path(__file__).parent / "reference"
_PREFIX = "model."
_TASKS = {"gpt": "CausalLM", "bert": "MaskedLM", "vit": "ImageClassification", "resnet": "ImageClassification"}


def write(source: Source, folder: Path) -> None:
    """Write all that `from_pretrained` reads."""
    task = _TASKS[source.facts["family"]]
    _write_json(folder / "config.json", _config(source, task))
    write_tensors(folder / WEIGHTS, to_torch(source.parameters, _PREFIX))
    (folder / "modeling_aether.py").write_text(modeling(), encoding="utf-8")
    if source.tokenizer is not None:
        eot = source.tokenizer.eot
        write_tokenizer(source.tokenizer, source.facts, folder)
        if task == "CausalLM":
            ids = dict(bos_token_id=eot, eos_token_id=eot, pad_token_id=eot)
            _write_json(folder / "generation_config.json", ids)
    else:
        _write_json(folder / "preprocessor_config.json", _preprocessor(source.facts))


def _config(source: Source, task: str) -> dict[str, Any]:
    """Return config.json: what transformers asks for, before the facts and the run."""
    heads = dict(AutoConfig="modeling_aether.AetherConfig")
    heads[f"AutoModelFor{task}"] = f"modeling_aether.AetherFor{task}"
    config: dict[str, Any] = dict(model_type="aether", architectures=[f"AetherFor{task}"], auto_map=heads)
    config |= dict(dtype=source.dtype, torch_dtype=source.dtype, tie_word_embeddings=False)
    if source.tokenizer is not None:
        eot = source.tokenizer.eot
        config |= dict(bos_token_id=eot, eos_token_id=eot, pad_token_id=eot)
    if source.labels is not None:
        names = source.labels.names
        config |= dict(id2label=dict(enumerate(names)), label2id={name: k for k, name in enumerate(names)})
    return config | dict(network=source.facts, aether=source.record)


def _preprocessor(f: dict[str, Any]) -> dict[str, Any]:
    """Return what makes of pictures what the network takes; `size` is that of its training images."""
    side = dict(height=f["image_size"], width=f["image_size"])
    numbers = dict(image_mean=[f["mean"]] * f["channels"], image_std=[f["std"]] * f["channels"])
    kind = dict(image_processor_type="ViTImageProcessor", do_convert_rgb=f["channels"] == 3)
    return kind | dict(do_resize=True, size=side, resample=2, do_rescale=True, do_normalize=True, **numbers)


def modeling() -> str:
    """Return one file of both, in which the network's own comes first."""
    parts = [_parted((_REFERENCE / name).read_text(encoding="utf-8")) for name in ("torch_model.py", "hf_model.py")]
    (_, imports, network), (docstring, more, wrappers) = parts
    kept = [line for line in more if not line.startswith("from aether") and line not in imports]
    return "\n".join([docstring, "", *imports, *kept, "", "", network, "", "", wrappers]) + "\n"


def _parted(text: str) -> tuple[str, list[str], str]:
    """Return the docstring of a module, the lines of its imports, and the rest."""
    body, lines = ast.parse(text).body, text.splitlines()
    first, imports = body[0], [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    docstring = "\n".join(lines[: first.end_lineno])
    rest = "\n".join(lines[imports[-1].end_lineno :]).strip("\n")
    return docstring, [ast.unparse(node) for node in imports], rest


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def parameters_from_hf(folder: Path) -> Parameters:
    """Return the parameters of an export to `hf`, mapped from its file."""
    return from_torch(read_tensors(folder / WEIGHTS), _PREFIX)


def read(folder: Path) -> Parameters | None:
    """Return the parameters of an export to `hf`; None of another folder."""
    return parameters_from_hf(folder) if (folder / "modeling_aether.py").exists() else None


def load(folder: Path) -> Any:
    """Return the model that transformers makes of a folder, by the folder's own code."""
    import transformers

    architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    kind = getattr(transformers, architecture.replace("AetherFor", "AutoModelFor"))
    return kind.from_pretrained(str(folder), trust_remote_code=True).eval()


def replay(folder: Path, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the logits of each batch."""
    import torch

    model = load(folder).float()
    with torch.inference_mode():
        for x in batches:
            yield model(to_tensor(x)).logits.numpy()


TARGET = Target(
    "a model of transformers, with its tokenizer",
    write,
    replay,
    use=(
        "from transformers import AutoModelForCausalLM  # or whose name is in config.json, auto_map\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)\n'
        "logits = model(inputs).logits"
    ),
    packages=("torch", "safetensors", "transformers", "tokenizers"),
    extra="hf",
    channels_first=True,
    environment={"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    read=read,
)
