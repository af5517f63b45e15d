"""Imports go one way: kernels <- sparse <- train. Nothing heavy is imported before it is needed.

`benchmarks` stands on top: it times the kernels' public ops, which train must not call.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Slow to import, or not installed with the core: only inside functions.
LAZY = {"av", "datasets", "diffusers", "matplotlib", "peft", "pyarrow", "tensorboard", "wandb"}
FILES = [
    path.relative_to(ROOT)
    for folder in ("kernels", "sparse", "train", "benchmarks", "gossamer")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
MODULES = {
    ".".join(("gossamer", *part.parts))
    for path in FILES
    for part in (path.with_suffix(""), path.parent)
}


@cache
def imports(path: Path, *, at_load: bool = False) -> list[str]:
    """Return the absolute name of every import of a file, or of those that run as it is loaded."""
    return list(_imports(path, at_load))


def _imports(path: Path, at_load: bool) -> Iterator[str]:
    pending: list[ast.AST] = [ast.parse((ROOT / path).read_text())]
    package = ("gossamer", *path.parent.parts)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield inner if inner in MODULES else module
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if not (at_load and (is_function or _is_for_types(node))):
            pending.extend(ast.iter_child_nodes(node))


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def is_external(name: str) -> bool:
    top = name.partition(".")[0]
    return top != "gossamer" and top not in sys.stdlib_module_names


def within(folder: str) -> list[Path]:
    return [path for path in FILES if path.parts[0] == folder]


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", within("kernels"), ids=str)
def test_kernels_import_torch_triton_and_themselves_relatively(path: Path) -> None:
    tops = {name.partition(".")[0] for name in imports(path) if is_external(name)}
    assert tops <= {"torch", "triton"}
    assert "import gossamer" not in (text := (ROOT / path).read_text())
    assert "from gossamer" not in text, "kernels/ can be published alone: import relatively"


@pytest.mark.parametrize("path", within("kernels"), ids=str)
def test_backends_are_imported_lazily_by_their_op_and_never_by_each_other(path: Path) -> None:
    own = ".".join(("gossamer", *path.parent.parts))
    backends = {f"{own}.{file.stem}" for file in (ROOT / path.parent).glob("*.py")}
    backends -= {f"{own}.op"}
    siblings = {name for name in imports(path, at_load=True) if name in backends}
    if len(path.parts) == 3:
        assert not siblings, f"{path} imports {siblings} when it is loaded"
    if path.stem not in ("op", "operator"):  # operator.py registers the compiled backends as one
        ends = (".reference", ".triton", ".hopper")
        foreign = {name for name in imports(path) if name.endswith(ends)}
        assert not {name for name in foreign if name.startswith("gossamer.")}


@pytest.mark.parametrize("path", within("sparse"), ids=str)
def test_sparse_imports_torch_and_the_kernels_public_ops(path: Path) -> None:
    for name in imports(path):
        if name.startswith("gossamer.kernels"):
            op = name.removeprefix("gossamer.kernels.")
            assert op in ("blocks", "merge") or op.endswith(".op"), name
        elif is_external(name):
            adapter = {"diffusers"} if "models" in path.parts else set()
            allowed = {"torch", "safetensors"} | adapter
            assert name.partition(".")[0] in allowed, name
        else:
            assert not name.startswith("gossamer.train"), name


@pytest.mark.parametrize("path", within("train"), ids=str)
def test_train_never_imports_kernels(path: Path) -> None:
    assert not [name for name in imports(path) if name.startswith("gossamer.kernels")]


@pytest.mark.parametrize("path", within("benchmarks"), ids=str)
def test_benchmarks_import_public_ops_and_sparse_and_of_train_only_helpers(path: Path) -> None:
    helpers = {f"gossamer.train.{x}" for x in ("files", "refusal", "study_output", "suggest")}
    entry = {"gossamer.train.cli"} if path.stem == "__main__" else set()
    if path.name == "tensors.py":  # captures from a teacher as calibration does
        modules = ("config", "samples", "job", "model", "stages")
        entry = {f"gossamer.train.{name}" for name in modules}
    externals = {"torch", "triton", "matplotlib"}
    if path.name == "parallel.py":  # takes the steps of a training, as its processes do
        names = "distiller draws launch losses model noise optimizers parallel pulse teacher"
        entry = {f"gossamer.train.{name}" for name in names.split()}
        externals.add("accelerate")
    if path.name in ("training_step.py", "memory.py"):  # take the trainer's own step
        names = "compiling config distiller draws loop lora memory model progress teacher"
        entry = {f"gossamer.train.{name}" for name in names.split()}
    if path.name == "calibration.py":  # runs the trainer's own calibration
        names = "calibrate config gauge measures memory"
        entry = {f"gossamer.train.{name}" for name in names.split()}
    for name in imports(path):
        if name.startswith("gossamer.kernels"):
            assert name == "gossamer.kernels.blocks" or name.endswith(".op"), name
        elif name.startswith("gossamer.train"):
            assert name in helpers | entry, name
        elif is_external(name):
            assert name.partition(".")[0] in externals, name


@pytest.mark.parametrize("path", FILES, ids=str)
def test_only_the_command_line_imports_benchmarks(path: Path) -> None:
    if path.parts[0] != "benchmarks" and path != Path("train/cli.py"):
        assert not [name for name in imports(path) if name.startswith("gossamer.benchmarks")]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_modules_of_this_package_are_imported_under_one_name(path: Path) -> None:
    tops = {name.partition(".")[0] for name in imports(path)}
    assert not tops & {"kernels", "sparse", "train", "benchmarks", "conf", "recipes"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_heavy_packages_are_imported_only_inside_functions(path: Path) -> None:
    lazy = LAZY - ({"diffusers"} if path.parts[:2] == ("sparse", "models") else set())
    assert not {name.partition(".")[0] for name in imports(path, at_load=True)} & lazy


@pytest.mark.parametrize("name", ["kernels", "sparse"])
def test_folders_that_others_own_the_name_of_are_no_packages(name: str) -> None:
    # With an __init__.py they would hide Hugging Face's kernels and pydata's sparse.
    assert not list((ROOT / name).rglob("__init__.py"))
    found = PathFinder.find_spec(name, [str(ROOT)])
    assert found is None or found.origin is None


@pytest.mark.parametrize("name", ["kernels", "sparse", "train", "benchmarks", "conf", "recipes"])
def test_the_facade_holds_relative_links(name: str) -> None:
    link = ROOT / "gossamer" / name
    assert link.is_symlink() and link.readlink() == Path("..") / name


def test_importing_the_package_imports_no_torch() -> None:
    run("import sys, gossamer; assert 'torch' not in sys.modules; gossamer.__version__")


def test_sparse_loads_without_triton_diffusers_or_training_packages() -> None:
    modules = [
        ".".join(("gossamer", *path.with_suffix("").parts))
        for path in within("sparse")
        if "models" not in path.parts
    ]
    missing = ["triton", "diffusers", "transformers", "accelerate", "hydra", "datasets"]
    run(
        f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
        + "\n".join(f"import {module}" for module in modules)
    )


def test_training_loads_without_optional_packages() -> None:
    modules = [
        ".".join(("gossamer", *path.with_suffix("").parts))
        for path in within("train")
        if path.name not in ("__init__.py", "__main__.py")
    ]
    missing = sorted(LAZY - {"diffusers", "pyarrow"})
    run(
        f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
        + "\n".join(f"import {module}" for module in modules)
    )
