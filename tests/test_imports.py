"""The import direction of the design, and what may not be imported at module level."""

import ast
import pathlib

import pytest

REPO = pathlib.Path(__file__).resolve().parent.parent
LAYERS = (
    ("errors", "tree", "resolve", "precision", "image_ops", "host_memory", "places"),
    (
        *("losses", "tiled", "tiles", "augment", "optim"),
        *("sharding", "checkpoint", "networks", "metrics", "statistics"),
        *("classification", "calibration", "comparison", "efficiency"),
    ),
    ("models", "data"),
    ("objectives", "evaluators", "report", "convert", "sweep"),
    ("state", "step", "validation", "recorder", "record"),
    (
        *("train", "nested", "stages", "lineage", "handover", "evaluation", "pictures"),
        "curriculum",
    ),
    ("main",),
)
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}
# Down within one layer.
INSIDE = {
    "curriculum": ("train", "evaluation", "handover", "lineage", "stages", "pictures"),
    "handover": ("train",),
    "evaluation": ("train", "nested", "lineage"),
    "lineage": ("train", "stages"),
    "pictures": ("train",),
    "nested": ("train",),
    "checkpoint": ("sharding",),
    "networks": ("checkpoint",),
    "losses": ("tiled", "sharding"),
    "tiled": ("tiles",),
    "tiles": ("sharding",),
    "step": ("state",),
    "recorder": ("state",),
    "validation": ("state",),
    "statistics": ("classification", "calibration"),
    "classification": ("calibration",),
    "tree": ("errors",),
    "resolve": ("errors",),
    "places": ("errors",),
    "precision": ("errors",),
    "image_ops": ("errors",),
}
FILES = sorted(p for p in (REPO / "bigmed").rglob("*.py") if p.name != "__init__.py")


def imports(path, module_level_only):
    parsed = ast.parse(path.read_text(encoding="utf-8"))
    nodes = parsed.body if module_level_only else ast.walk(parsed)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(module):
    return module.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(REPO / "bigmed")))
def test_imports_go_down_only(path):
    here = path.relative_to(REPO / "bigmed").with_suffix("").parts[0]
    assert here in LAYER, f"{here} has no place in the layers"
    for module in imports(path, module_level_only=False):
        if not module.startswith("bigmed.") or module == "bigmed.__version__":
            continue
        there = part_of(module)
        siblings = here == there or there in INSIDE.get(here, ())
        assert siblings or LAYER[there] < LAYER[here], f"{here} may not import {there}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(REPO / "bigmed")))
def test_heavy_or_unsafe_modules_are_not_imported(path):
    roots = {name.split(".")[0] for name in imports(path, module_level_only=True)}
    assert not roots & {"tensorflow", "torch"}
    everywhere = {name.split(".")[0] for name in imports(path, module_level_only=False)}
    assert not everywhere & {"pickle", "joblib", "tools", "configs"}
    orbax = {name for name in everywhere if name == "orbax"}
    assert not orbax or path.name == "checkpoint.py"


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.py")), ids=lambda p: p.name)
def test_configs_import_configs_alone(path):
    roots = {name.split(".")[0] for name in imports(path, module_level_only=False)}
    assert roots <= {"ml_collections", "configs"}


def test_files_stay_short():
    long = {p.name: n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert not long
