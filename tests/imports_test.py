"""Who may import whom: ranks, package rules and declared dependencies, read from the source with `ast`.

Every rule is a function from the imports of a tree to its complaints. It must find none in the repository, and at
least one in a small made-up tree, so that a rule which no longer bites is noticed.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("aether", "launch", "tools", "configs")

# A module imports only lower ranks or its own folder. `errors` stands below `config`, which raises them.
RANKS = {
    **{
        "errors": -1,
        "chips": 0,
        "figures": 0,
        "events": 0,
        "config": 0,
        "kernels": 0,
        "storage": 0,
        "remote": 0,
        "nn": 2,
        "models": 3,
    },
    **{"parallel": 1, "data": 1, "arrays": 1, "processes": 1},
    **{"losses": 4, "generate": 4, "checkpoint": 4, "workdir": 4},
    **{
        "evaluate": 5,
        "explain": 5,
        "train": 6,
        "testing": 6,
        "export": 7,
        "plan": 7,
        "report": 7,
        "launch": 8,
        "tools": 9,
    },
}
# Packages with one home each: the modules, by regular expression, that may import them.
HOMES = {
    "orbax": r"aether\.checkpoint\.tensors",
    "grain": r"aether\.data(\..*)?",
    "optax": r"(aether\.train|tools\.demonstrations)(\..*)?",
    "absl.flags": r"(launch|tools)(\..*)?",
    "absl.app": r"(launch|tools)(\..*)?",
}
NUMERIC = ("jax", "jaxlib", "flax", "optax", "orbax")
DISTRIBUTIONS = {
    "absl": "absl-py",
    "faiss": "faiss-cpu",
    "orbax": "orbax-checkpoint",
    "yaml": "pyyaml",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
}  # names that differ


@dataclass(frozen=True)
class Import:
    """One imported name: `module` takes `target` (full dotted name), `lazy` if inside a function."""

    module: str
    target: str
    line: int
    lazy: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def module_name(path: str) -> str:
    """Return the dotted name of a source file: `aether/nn/yat.py` is `aether.nn.yat`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def read_imports(files: Mapping[str, str]) -> list[Import]:
    """List every import of `files` (path -> source), those inside functions too."""
    found = []
    for path, source in files.items():
        package = module_name(path) if path.endswith("/__init__.py") else module_name(path).rpartition(".")[0]
        for node, lazy in _walk(ast.parse(source), False):
            for target in _targets(node, package):
                found.append(Import(module_name(path), target, node.lineno, lazy))
    return found


def _walk(node: ast.AST, lazy: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, lazy
        typing_only = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _walk(child, lazy or inside or typing_only)


def _targets(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    return [".".join([*parents, *filter(None, [node.module]), name.name]) for name in node.names]


def inside(name: str, package: str) -> bool:
    """Say whether dotted `name` is `package` or lies in it."""
    return name == package or name.startswith(package + ".")


def unit(name: str) -> str:
    """Return what has a rank: `aether.nn.yat` -> `nn`, `launch.cli` -> `launch`, `jax` -> ``."""
    first, _, rest = name.partition(".")
    return rest.split(".")[0] if first == "aether" else first if first in FOLDERS else ""


def rank_rule(files: Mapping[str, str]) -> list[str]:
    """Complain about imports of equal or higher ranks, and about folders without a rank."""
    complaints = []
    for i in read_imports(files):
        here, there = unit(i.module), unit(i.target)
        if here == "configs":
            if not inside(i.target, "aether.config") and i.target.split(".")[0] != "ml_collections":
                complaints.append(f"{i}; a config imports aether.config alone")
        elif i.module == "aether":
            complaints.append(f"{i}; aether/__init__.py imports nothing, since every import of ours runs it")
        elif here not in RANKS or (there and there not in RANKS):
            complaints.append(f"{i}; give both a rank in {Path(__file__).name}")
        elif there and here != there and RANKS[there] >= RANKS[here]:
            complaints.append(f"{i}; rank {RANKS[here]} imports only lower ranks, {there} has {RANKS[there]}")
    return complaints


def home_rule(files: Mapping[str, str]) -> list[str]:
    """Complain about packages imported outside their one home."""
    return [
        f"{i}; only {home} may"
        for i in read_imports(files)
        for package, home in HOMES.items()
        if inside(i.target, package) and not re.fullmatch(home, i.module)
    ]


def nnx_rule(files: Mapping[str, str]) -> list[str]:
    """Complain about flax in any form but `from flax import nnx`; the network exported to linen is for its users."""
    found = (i for i in read_imports(files) if i.module != "aether.export.reference.linen_model")
    return [str(i) for i in found if inside(i.target, "flax") and not inside(i.target, "flax.nnx")]


def data_rule(files: Mapping[str, str]) -> list[str]:
    """Complain where the data pipeline or the schema can reach JAX, directly or through our own modules."""
    starts = ("aether.data", "aether.config", "aether.errors")
    return _reaches(files, NUMERIC, lambda m: any(inside(m, start) for start in starts), True)


def start_rule(files: Mapping[str, str]) -> list[str]:
    """Complain where importing a main or a config loads something slow, before the flags are even parsed."""
    slow = (*NUMERIC, "grain", "matplotlib", "tensorboardX", "tensorflow_datasets", "pyarrow", "wandb")
    return _reaches(files, slow, lambda m: unit(m) in ("launch", "configs"), False)


def _reaches(
    files: Mapping[str, str], packages: tuple[str, ...], start: Callable[[str], bool], lazy: bool
) -> list[str]:
    imports = [i for i in read_imports(files) if lazy or not i.lazy]
    graph = module_graph(files, imports)
    reached = {m for m in graph if start(m)}
    queue = list(reached)
    while queue:
        new = graph[queue.pop()] - reached
        reached |= new
        queue += new
    return [str(i) for i in imports if i.module in reached and i.target.split(".")[0] in packages]


def module_graph(files: Mapping[str, str], imports: list[Import]) -> dict[str, set[str]]:
    """Return module -> our modules that its import runs: the targets and the packages they lie in."""
    graph: dict[str, set[str]] = {module_name(path): set() for path in files}
    for i in imports:
        parts = i.target.split(".")
        names = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        graph[i.module] |= {n for n in names if n in graph and not inside(i.module, n)}
    return graph


def cycle_rule(files: Mapping[str, str]) -> list[str]:
    """Complain about modules that reach themselves, also through imports inside functions."""
    graph = module_graph(files, read_imports(files))
    while leaves := {m for m, targets in graph.items() if not targets}:
        graph = {m: targets - leaves for m, targets in graph.items() if m not in leaves}
    return [f"{m} is on, or leads to, a cycle with {', '.join(sorted(t))}" for m, t in sorted(graph.items())]


def name_rule(files: Mapping[str, str]) -> list[str]:
    """Complain about files named after nothing."""
    return [
        path for path in files if {"utils", "util", "common", "helpers", "misc"} & set(module_name(path).split("."))
    ]


def declared_rule(files: Mapping[str, str]) -> list[str]:
    """Complain about packages that pyproject.toml does not list; one of an extra is imported inside functions only.

    Networks for other frameworks are files of their own, which only functions import.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {_distribution(line) for line in project["dependencies"]}
    extras = {_distribution(line) for lines in project["optional-dependencies"].values() for line in lines}
    complaints = []
    for i in read_imports(files):
        package = i.target.split(".")[0]
        if package in sys.stdlib_module_names or package in FOLDERS:
            continue
        name = _distribution(DISTRIBUTIONS.get(package, package))
        optional = i.lazy or inside(i.module, "aether.export.reference")
        if name not in needed and not (optional and name in extras):
            complaints.append(f"{i}; {name} is not in dependencies" + (" (only an extra)" if name in extras else ""))
    return complaints


def _distribution(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


BAD = [
    (rank_rule, {"aether/nn/a.py": "from aether.models import gpt"}),
    (rank_rule, {"aether/nn/a.py": "def f():\n    from ..train import loop"}),
    (rank_rule, {"aether/kernels/a.py": "import aether.config"}),
    (rank_rule, {"aether/data/a.py": "from aether import parallel"}),
    (rank_rule, {"aether/novelty.py": "import math"}),
    (rank_rule, {"aether/__init__.py": "from aether.config import Config"}),
    (rank_rule, {"configs/a.py": "import os"}),
    (rank_rule, {"configs/a.py": "from aether.nn import yat"}),
    (home_rule, {"aether/train/a.py": "import orbax.checkpoint as ocp"}),
    (home_rule, {"aether/train/a.py": "def f():\n    import grain"}),
    (home_rule, {"aether/losses.py": "import optax"}),
    (home_rule, {"tools/bench.py": "import optax"}),
    (home_rule, {"aether/train/a.py": "from absl import flags"}),
    (nnx_rule, {"aether/nn/a.py": "import flax.linen as nn"}),
    (nnx_rule, {"aether/nn/a.py": "from flax import struct"}),
    (nnx_rule, {"aether/export/linen.py": "import flax.linen as nn"}),
    (data_rule, {"aether/data/a.py": "def f():\n    import jax"}),
    (data_rule, {"aether/data/a.py": "from aether.kernels import rope", "aether/kernels/rope.py": "import jax"}),
    (data_rule, {"aether/data/a.py": "from aether.kernels import b", "aether/kernels/__init__.py": "import jax"}),
    (data_rule, {"aether/config/model.py": "import jax"}),
    (start_rule, {"launch/a.py": "from aether.train import loop", "aether/train/loop.py": "import jax"}),
    (cycle_rule, {"aether/nn/a.py": "from aether.nn import b", "aether/nn/b.py": "def f():\n    import aether.nn.a"}),
    (name_rule, {"aether/nn/utils.py": ""}),
    (name_rule, {"tools/common.py": ""}),
    (name_rule, {"aether/utils/x.py": ""}),
    (declared_rule, {"aether/nn/a.py": "import torch"}),
    (declared_rule, {"aether/nn/a.py": "import tiktoken"}),
    (declared_rule, {"aether/export/reference/a.py": "import paddle"}),
]
GOOD = [
    (rank_rule, {"aether/config/model.py": "from aether.errors import InputError"}),
    (rank_rule, {"tools/a.py": "from launch import cli", "launch/cli.py": "from aether.train.loop import train"}),
    (home_rule, {"aether/checkpoint/tensors.py": "import orbax", "aether/data/a.py": "from absl import logging"}),
    (home_rule, {"tools/demonstrations/xor.py": "import optax"}),
    (nnx_rule, {"aether/nn/a.py": "from flax import nnx"}),
    (nnx_rule, {"aether/export/reference/linen_model.py": "import flax.linen as nn"}),
    (start_rule, {"launch/a.py": "def f():\n    import jax"}),
    (cycle_rule, {"aether/nn/__init__.py": "from aether.nn import a", "aether/nn/a.py": "import aether.nn.b"}),
    (declared_rule, {"aether/nn/a.py": "import numpy, absl.logging\ndef f():\n    import tiktoken"}),
    (declared_rule, {"aether/export/reference/a.py": "import tiktoken"}),
]
RULES = [rank_rule, home_rule, nnx_rule, data_rule, start_rule, cycle_rule, name_rule, declared_rule]


@pytest.fixture(scope="module")
def tree() -> dict[str, str]:
    paths = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_repository_keeps(rule, tree):
    assert len(tree) > 15
    assert rule(tree) == []


@pytest.mark.parametrize(("rule", "files"), BAD)
def test_rule_bites(rule, files):
    assert rule(files)


@pytest.mark.parametrize(("rule", "files"), GOOD)
def test_rule_lets_pass(rule, files):
    assert rule(files) == []
