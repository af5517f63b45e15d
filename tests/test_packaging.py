"""The wheel and the editable install work from any directory, beside Hugging Face's kernels."""

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("gossamer", "kernels", "sparse", "train", "benchmarks", "conf", "recipes")
FILES = ("pyproject.toml", "README.md", "LICENSE")

FOREIGN = "import kernels; assert kernels.get_kernel() == 'hub', kernels"
# What a user does first, and what breaks when a part is missing from the installation.
PROBE = f"""
import os, sys
from importlib.resources import files
from pathlib import Path
import gossamer.kernels.blocks
import gossamer.sparse.layout
from gossamer.train.config import build, compose
cfg = compose(["layout=row_major", "layout.q_block=32"])
assert build(cfg.layout).block_shape == (32, 64)
assert Path(cfg.model.path).parent.parent == Path(str(files("gossamer.recipes"))).resolve()
print(Path(gossamer.__file__).resolve())
{FOREIGN}
"""
RECIPES = """
from gossamer.train.config import compose, recipes
assert all(compose([f"recipe={name}"]).name == name for name in recipes())
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(made_once: Callable[..., Path]) -> Path:
    """Copy what a clone holds, so that building leaves nothing in this one."""

    def fill(folder: Path) -> None:
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        for part in PARTS:
            shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=ignore)
        for name in FILES:
            shutil.copy(ROOT / name, folder / name)

    return made_once("checkout", fill)


@pytest.fixture(scope="module")
def wheel(checkout: Path, made_once: Callable[..., Path]) -> Path:
    def fill(out: Path) -> None:
        pip("wheel", "--no-deps", "--no-build-isolation", "-w", out, checkout)

    (built,) = made_once("wheel", fill).glob("*.whl")
    return built


@pytest.fixture(scope="module", params=["wheel", "editable"])
def python(
    request: pytest.FixtureRequest, checkout: Path, wheel: Path, made_once: Callable[..., Path]
) -> Path:
    """Return the interpreter of an environment with gossamer and a package called kernels."""
    source = [wheel] if request.param == "wheel" else ["--no-build-isolation", "-e", checkout]

    def fill(environment: Path) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", environment)
        python = environment / "bin" / "python"
        site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
        # The tests' own environment supplies torch and the rest; nothing is downloaded.
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (site / "kernels").mkdir()
        (site / "kernels" / "__init__.py").write_text("def get_kernel():\n    return 'hub'\n")
        pip("--python", python, "install", "--no-deps", "--no-index", *source)

    return made_once(f"installed-{request.param}", fill) / "bin" / "python"


def run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def pip(*arguments: object) -> None:
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)


def test_the_wheel_holds_every_module_config_recipe_and_asset(wheel: Path) -> None:
    expected = {"gossamer/__init__.py", "gossamer/py.typed"}
    for part in PARTS[1:]:
        for path in (ROOT / part).rglob("*"):
            is_asset = part == "recipes" or path.suffix in (".py", ".yaml")
            if path.is_file() and is_asset and "__pycache__" not in path.parts:
                expected.add(f"gossamer/{path.relative_to(ROOT)}")
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("gossamer/")}
        tops = {name.partition("/")[0] for name in archive.namelist()}
    assert names == expected
    assert tops == {"gossamer", wheel.name.replace("-py3-none-any.whl", ".dist-info")}


def test_it_works_from_any_directory(python: Path, checkout: Path, tmp_path: Path) -> None:
    run(python, "-c", PROBE, cwd=checkout)
    environment = python.parent.parent
    is_editable = environment.name == "installed-editable"  # its recipes are the checkout's
    found = Path(run(python, "-c", PROBE + RECIPES * (not is_editable), cwd=tmp_path))
    assert found.is_relative_to(checkout if is_editable else environment)
    gossamer = python.parent / "gossamer"
    assert "usage: gossamer VERB" in run(gossamer, "--help", cwd=tmp_path)
    assert "sparsity: 0.7" in run(gossamer, "train", "--cfg", "sparsity=0.7", cwd=tmp_path)


def test_hugging_faces_kernels_stays_theirs(python: Path, checkout: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, checkout):
        run(python, "-c", FOREIGN, cwd=folder)  # PROBE does so after gossamer's own
