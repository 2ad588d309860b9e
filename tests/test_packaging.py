"""What is installed and imported: names, version, layers, and that the folder `kernels` shadows nobody's package."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import xhead

ROOT = Path(__file__).parent.parent
PUBLIC = {"LazyLogits", "linear_cross_entropy", "list_heads", "list_losses", "patch", "status", "unpatch"}
FOLDERS = ("xhead", "kernels", "recipes", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path.name != "__main__.py")


def run_python(code: str, *paths: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_folder_kernels_does_not_shadow_the_hub_loader(tmp_path):
    loader = tmp_path / "kernels" / "__init__.py"
    loader.parent.mkdir()
    loader.write_text("")
    # The repository's root comes first on the path here, as it does for every script started from it.
    assert run_python("import kernels; print(kernels.__file__)", tmp_path) == str(loader)


def test_kernels_package_imports_without_a_gpu():
    assert Path(run_python("import xhead_kernels; print(xhead_kernels.__file__)")).parent == (
        ROOT / "kernels" / "xhead_kernels"
    )


def test_public_names():
    assert set(xhead.__all__) >= PUBLIC
    for name in xhead.__all__:
        assert hasattr(xhead, name), name


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_are_documented(name):
    assert len(getattr(xhead, name).__doc__ or "") > 40


def test_version_is_the_installed_one():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert xhead.__version__ == declared[1] == importlib.metadata.version("xhead")


def test_import_brings_no_optional_package():
    optional = ("matplotlib", "datasets", "peft", "trl", "triton", "scipy")
    # torch's own compiler imports triton where it is installed.
    code = "import sys, torch._dynamo; before = set(sys.modules); import xhead; "
    code += f"print({optional!r}, set(sys.modules) - before)"
    _, _, imported = run_python(code).partition(")")
    assert not [name for name in optional if f"'{name}'" in imported]


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        ("kernels/xhead_kernels", r"xhead\b"),
        ("xhead/engines", r"xhead\.(statistics|autograd|lazy|losses|heads|patch|trainer)\b"),
        ("xhead/statistics.py", r"xhead\.(lazy|losses|heads|patch|trainer)\b"),
        ("xhead/autograd.py", r"xhead\.(statistics|lazy|losses|heads|patch|trainer)\b"),
        ("xhead/losses", r"xhead\.(heads|patch|trainer)\b"),
        ("xhead/retrieval", r"xhead\.(heads|patch|trainer)\b"),
        ("xhead/heads", r"xhead\.(patch|trainer)\b"),
        ("xhead", r"(recipes|benchmarks|tests)\b"),
    ],
)
def test_nothing_imports_upward(lower, upper):
    place = ROOT / lower
    for path in [place] if place.is_file() else place.rglob("*.py"):
        assert not [name for name in imports_of(path) if re.match(upper, name)], path


def test_triton_is_left_to_torch():
    for name in ("pyproject.toml", "constraints.txt"):
        lines = [line.split("#")[0] for line in (ROOT / name).read_text().splitlines()]
        assert not [line for line in lines if re.match(r'\s*"?triton', line)], name


def test_every_constraint_is_one_version():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 30
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_are_short_and_say_what_they_are(path):
    text = path.read_text()
    assert text.count("\n") <= 350
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "no module docstring"
