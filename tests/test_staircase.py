"""The staircase of imports holds, and import-linter sees it when it does not."""

import ast
import shutil
import subprocess
import sys
import tomllib
from itertools import accumulate
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("configs", "shards", "stages")
LINT = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])"


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on a tree as `make check` does."""
    return subprocess.run([sys.executable, "-c", LINT], cwd=tree, capture_output=True, text=True, check=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source files and of the contracts."""
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package,
            tmp_path / package,
            ignore=lambda folder, names: [
                name for name in names if Path(folder, name).is_file() and not name.endswith(".py")
            ],
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_staircase_holds_as_it_is(tree: Path) -> None:
    done = lint(tree)
    assert done.returncode == 0, done.stdout
    assert "4 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "forbidden", "contract"),
    [
        ("configs/extra.py", "import stages.prompts", "The staircase"),
        ("shards/extra.py", "from stages.flow import path", "The staircase"),
        ("stages/nets/extra.py", "import stages.__main__", "The staircase"),
        ("stages/flow/extra.py", "import zarr", "The mathematics knows no network and no disk"),
        ("stages/train/losses.py", "import diffusers", "The mathematics knows no network and no disk"),
        ("stages/david/fusion.py", "import stages.nets", "David sees features, never a network"),
        ("stages/cache/targets.py", "import stages.tiny", "Nobody outside knows the embedded teacher"),
    ],
)
def test_a_forbidden_import_fails_the_check(tree: Path, module: str, forbidden: str, contract: str) -> None:
    file = tree / module
    file.parent.mkdir(exist_ok=True)
    (file.parent / "__init__.py").touch()
    with file.open("a") as source:
        source.write(f"\n{forbidden}\n")
    done = lint(tree)
    assert done.returncode == 1
    assert f"{contract} BROKEN" in done.stdout


def test_every_module_has_its_step() -> None:
    """Each module below stages/ is on a step, by its own name or by that of a package that holds it."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    steps = {module.strip(" ()") for layer in contracts[0]["layers"] for module in layer.split("|")}
    files = (path.relative_to(ROOT).with_suffix("").parts for path in (ROOT / "stages").rglob("*.py"))
    modules = {".".join(parts) for parts in files if parts[-1] != "__init__"}
    names = {module: set(accumulate(module.split("."), "{}.{}".format)) for module in modules}
    assert {module for module in modules if not names[module] & steps} == set()


OPTIONAL = {"bitsandbytes", "datasets", "mlxtend", "moto", "obstore", "peft", "ray", "s3fs", "trackio", "wandb"}
"""Packages of an extra; those of `test` are installed here, so that only a law shows who needs them."""


def test_a_package_of_an_extra_is_imported_by_no_module_before_it_is_needed() -> None:
    importing = {
        f"{path.relative_to(ROOT)}: {name}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        if name.partition(".")[0] in OPTIONAL
    }
    assert importing == set()


def test_the_embedded_cache_is_made_without_a_package_of_an_extra(tmp_path: Path) -> None:
    words = ["cache-teacher", "--config", "configs/tiny.yaml", "--run", str(tmp_path), "--count", "2"]
    words += ["--validation-count", "1", "--render.states.steps", "4"]
    program = f"import sys; from stages.__main__ import main; code = main({words!r}); print(sorted(sys.modules)); "
    done = subprocess.run(
        [sys.executable, "-c", f"{program}sys.exit(code)"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = {name.partition(".")[0] for name in ast.literal_eval(done.stdout.splitlines()[-1])}
    assert imported & (OPTIONAL - {"peft"}) == set()  # diffusers looks for peft by itself
