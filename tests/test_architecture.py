"""The rooms keep their walls: who may import whom, where each third-party package may appear, and that nothing goes in circles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Values flow config -> data -> model -> optim -> engine -> loop -> telemetry, checkpoint; a room imports only what is named here.
MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "dist": set(),
    "optim": set(),
    "model": {"config"},
    "data": {"config", "dist"},
    "engine": {"config", "dist", "optim"},
    "loop": {"config", "dist", "data", "engine"},
    "telemetry": {"config", "dist", "loop"},
    "checkpoint": {"config", "dist", "optim", "loop"},
    "planning": {"config", "model", "optim", "engine"},
    "report": {"config"},
    "comparison": {"config", "dist", "report"},
}
DATA_PREP_MAY_IMPORT = {"config", "dist", "data"}
# Nobody imports these.
COMMANDS = {"ngpt.train", "ngpt.plan", "ngpt.evaluate", "ngpt.generate", "ngpt.export", "ngpt.compare", "ngpt.report.__main__"}
ONLY_IN = {
    "deepspeed": {"ngpt/engine/deepspeed_engine.py"},
    "hydra": {"ngpt/config/compose.py", "ngpt/train.py"},
    "wandb": {"ngpt/telemetry/sinks.py"},
}
IMPORTED_ON_USE = {"wandb", "datasets", "matplotlib"}  # slow to import, and most commands never need them
WITHOUT_TORCH = {"config"}
WITHOUT_TORCH_DISTRIBUTED = {"config", "optim", "model"}
THE_HOOK = "register_post_accumulate_grad_hook"
THE_HOOK_FILE = "ngpt/optim/per_layer_hook.py"


class Import(NamedTuple):
    """One imported dotted name; `from a import b` gives `a.b`."""

    name: str
    line: int
    on_use: bool  # inside a function, or under TYPE_CHECKING and so never at run time


def imports_of(tree: ast.Module) -> Iterator[Import]:
    """Every import of a module, those inside functions and under TYPE_CHECKING included."""
    deferred = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(outer, ast.If) and ast.unparse(outer.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"})
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        on_use = id(node) in deferred
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, on_use) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield from (Import(f"{origin}.{alias.name}", node.lineno, on_use) for alias in node.names)


def attribute_chains(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every dotted expression `a.b.c`, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names, inner = [node.attr], node.value
            while isinstance(inner, ast.Attribute):
                names.append(inner.attr)
                inner = inner.value
            names.append(inner.id if isinstance(inner, ast.Name) else "?")
            yield ".".join(reversed(names)), node.lineno


def module_name(path: Path, root: Path) -> str:
    """`ngpt/data/packing.py` -> `ngpt.data.packing`; a package's `__init__.py` bears the package's name."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """`ngpt.data.packing` -> `data`; the modules directly in ngpt, which put the rooms together, are in room ''."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else ""


def violations(root: Path) -> list[str]:
    """Every broken rule under `root` (the repository, or a skeleton of it), as `file:line: what`."""
    files = sorted([*(root / "ngpt").rglob("*.py"), *(root / "data_prep").rglob("*.py")])
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    modules = {module_name(path, root) for path in files}
    found = []
    for path, tree in trees.items():
        file, module = path.relative_to(root).as_posix(), module_name(path, root)
        problems = [*import_problems(file, module, tree), *code_problems(file, module, tree)]
        found += [f"{file}:{line}: {problem}" for line, problem in problems]
    strangers = {path.name for path in (root / "ngpt").iterdir() if path.is_dir() and any(path.glob("*.py"))} - set(MAY_IMPORT)
    found += [f"ngpt/{folder}: no such room in the plan" for folder in sorted(strangers)]
    graph = {
        module_name(path, root): {target for item in imports_of(tree) if (target := imported_module(item.name, modules))}
        for path, tree in trees.items()
    }
    found += [f"import cycle: {' -> '.join(cycle)}" for cycle in cycles(graph)]
    return found


def import_problems(file: str, module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Rules about what a module imports."""
    here = room_of(module)
    place = here or ("data_prep" if file.startswith("data_prep/") else "ngpt")
    for name, line, on_use in imports_of(tree):
        top = name.split(".")[0]
        if name.startswith("."):
            yield line, "relative import; write the full name, from ngpt on"
        if file == "ngpt/__init__.py" or (file.endswith("/__init__.py") and here not in {"", "optim"}):
            yield line, "the package's __init__ imports nothing, so that importing one room does not load others"
        if top in {"data_prep", "bench", "tests"} and file.startswith("ngpt/"):
            yield line, f"ngpt may not import {top}"
        if any(name == command or name.startswith(f"{command}.") for command in COMMANDS):
            yield line, f"nobody imports a command ({name})"
        if top == "ngpt" and name not in {"ngpt", "ngpt.__version__"}:
            there = room_of(name)
            allowed = DATA_PREP_MAY_IMPORT if place == "data_prep" else MAY_IMPORT.get(here, set(MAY_IMPORT) | {""}) | {here}
            if there not in allowed:
                yield line, f"{place} may not import {name}"
        if top in ONLY_IN and file not in ONLY_IN[top]:
            yield line, f"{top} is imported only in {', '.join(sorted(ONLY_IN[top]))}"
        if top in IMPORTED_ON_USE and file.startswith("ngpt/") and not on_use:
            yield line, f"{top} is imported on use, inside a function"
        if top == "torch" and here in WITHOUT_TORCH:
            yield line, f"{here} may not import torch"
        if here == "optim" and top not in {"torch", "ngpt"} and not name.startswith(".") and top not in sys.stdlib_module_names:
            yield line, f"optim is a stand-alone library: torch only, not {top}"
        if name.startswith("torch.distributed") and here in WITHOUT_TORCH_DISTRIBUTED:
            yield line, f"{here} may not import torch.distributed"


def code_problems(file: str, module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Rules about names that a module uses without importing them."""
    for name, line in attribute_chains(tree):
        if name.endswith(f".{THE_HOOK}") and file != THE_HOOK_FILE:
            yield line, f"{THE_HOOK} is called only in {THE_HOOK_FILE}"
        if name == "torch.distributed" and room_of(module) in WITHOUT_TORCH_DISTRIBUTED:
            yield line, "torch.distributed has no place here"


def imported_module(name: str, modules: set[str]) -> str | None:
    """The project's module that an imported name is or lives in; None for anybody else's."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name if name not in {"", "ngpt"} else None


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Each circle that a depth-first walk closes, as the modules on it, the first one repeated at the end."""
    found: list[list[str]] = []
    finished: set[str] = set()

    def walk(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append([*trail[trail.index(module) :], module])
        elif module not in finished:
            for target in sorted(graph.get(module, set())):
                walk(target, [*trail, module])
            finished.add(module)

    for module in sorted(graph):
        walk(module, [])
    return found


def loaded_after(statement: str, packages: list[str]) -> list[str]:
    """Which of `packages` a fresh interpreter has loaded after running `statement`."""
    code = f"{statement}\nimport sys\nprint([name for name in {packages!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout.strip().splitlines()[-1])


# ------------------------------------------------------------------------------------------------------ the repository
def test_every_import_rule_holds() -> None:
    assert violations(REPOSITORY) == []


def test_the_optimizer_library_stands_alone() -> None:
    heavy = ["deepspeed", "hydra", "omegaconf", "ngpt.config", "wandb", "datasets", "sentencepiece"]
    assert loaded_after("from ngpt.optim import NaturalGaLore", heavy) == []


def test_settings_load_without_torch() -> None:
    settings, heavy = "import ngpt.config.schema, ngpt.config.validate, ngpt.config.compose", ["torch", "deepspeed", "wandb"]
    assert loaded_after(settings, [*heavy, "sentencepiece"]) == []
    # Validation opens the tokenizer's model.
    assert loaded_after(f"{settings}, sentencepiece", heavy) == []


def test_the_train_command_loads_no_torch_before_the_settings_are_checked() -> None:
    assert loaded_after("import ngpt.train", ["torch", "deepspeed", "wandb"]) == []


def test_training_loads_no_package_before_its_use() -> None:
    assert loaded_after("import ngpt.run", [*sorted(IMPORTED_ON_USE), "deepspeed", "transformers", "pandas"]) == []


def test_the_configuration_tree_holds_values_and_no_code_paths() -> None:
    offenders = [path.name for path in (REPOSITORY / "conf").rglob("*.yaml") if "_target_" in path.read_text(encoding="utf-8")]
    assert offenders == []
    assert list((REPOSITORY / "conf").rglob("*.py")) == []


# --------------------------------------------------------------------------------------------- the rules catch breaches
@pytest.fixture
def skeleton(tmp_path: Path) -> Path:
    """A repository that obeys every rule: each room has one module that imports all it may."""
    for room, allowed in MAY_IMPORT.items():
        folder = tmp_path / "ngpt" / room
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(f'"""Room {room}."""\n')
        (folder / "part.py").write_text("".join(f"from ngpt.{other} import part as {other}_part\n" for other in sorted(allowed)))
    (tmp_path / "ngpt" / "__init__.py").write_text('"""Package."""\n')
    (tmp_path / "ngpt/data/hub.py").write_text("from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import datasets\n")
    (tmp_path / "ngpt" / "train.py").write_text("import hydra\n" + "".join(f"import ngpt.{room}.part\n" for room in MAY_IMPORT))
    (tmp_path / THE_HOOK_FILE).write_text(f"def attach(p, f):\n    p.{THE_HOOK}(f)\n")
    (tmp_path / "data_prep").mkdir()
    (tmp_path / "data_prep" / "tokenize.py").write_text("import ngpt.data.part\n")
    return tmp_path


def test_a_repository_that_obeys_is_left_in_peace(skeleton: Path) -> None:
    assert violations(skeleton) == []


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("ngpt/optim/part.py", "from ngpt.dist.part import mean", "optim may not import ngpt.dist"),
        ("ngpt/optim/part.py", "import torch.distributed as dist", "optim may not import torch.distributed"),
        ("ngpt/optim/part.py", "import torch\ntorch.distributed.all_reduce(1)", "torch.distributed has no place here"),
        ("ngpt/optim/part.py", "import numpy as np", "torch only, not numpy"),
        ("ngpt/optim/part.py", "from .per_layer_hook import attach", "relative import"),
        ("ngpt/model/part.py", "from torch import distributed", "model may not import torch.distributed"),
        ("ngpt/model/part.py", "from ngpt import optim", "model may not import ngpt.optim"),
        ("ngpt/config/part.py", "def f():\n    import torch", "config may not import torch"),
        ("ngpt/data/part.py", "from ngpt.model.part import Llama", "data may not import ngpt.model"),
        ("ngpt/data/part.py", "import datasets", "imported on use"),
        ("ngpt/data/part.py", "import data_prep.tokenize", "ngpt may not import data_prep"),
        ("ngpt/engine/part.py", "from ngpt.model.part import Llama", "engine may not import ngpt.model"),
        ("ngpt/engine/part.py", "def f():\n    import deepspeed.comm", "deepspeed is imported only in"),
        ("ngpt/loop/part.py", "from ngpt.telemetry import part", "loop may not import ngpt.telemetry"),
        ("ngpt/loop/part.py", "def f(p):\n    p.register_post_accumulate_grad_hook(f)", "is called only in ngpt/optim/per_layer_hook.py"),
        ("ngpt/checkpoint/part.py", "from ngpt.engine.part import Engine", "checkpoint may not import ngpt.engine"),
        ("ngpt/telemetry/part.py", "def f():\n    import wandb", "wandb is imported only in"),
        ("ngpt/telemetry/sinks.py", "import wandb", "imported on use"),
        ("ngpt/dist/part.py", "import ngpt.train", "nobody imports a command"),
        ("ngpt/dist/part.py", "from ngpt import run", "dist may not import ngpt.run"),
        ("ngpt/run.py", "from ngpt.train import main", "nobody imports a command"),
        ("ngpt/run.py", "import hydra", "hydra is imported only in"),
        ("ngpt/__init__.py", "from ngpt.optim import part", "__init__ imports nothing"),
        ("ngpt/data/__init__.py", "from ngpt.data.part import x", "__init__ imports nothing"),
        ("ngpt/utils/part.py", "", "no such room in the plan"),
        ("data_prep/tokenize.py", "import ngpt.optim.part", "data_prep may not import ngpt.optim"),
    ],
)
def test_a_breach_is_caught(skeleton: Path, file: str, line: str, complaint: str) -> None:
    path = skeleton / file
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + line + "\n")
    found = violations(skeleton)
    assert any(complaint in problem for problem in found), found


def test_a_cycle_is_caught_even_when_a_function_hides_it(skeleton: Path) -> None:
    (skeleton / "ngpt/data/first.py").write_text("from ngpt.data.second import g\n")
    (skeleton / "ngpt/data/second.py").write_text("def g():\n    from ngpt.data import first\n    return first\n")
    assert violations(skeleton) == ["import cycle: ngpt.data.first -> ngpt.data.second -> ngpt.data.first"]
