"""The house: imports run one way, and the lesson stands on nothing of ours above it."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAMINGO = ROOT / "flamingo"

# Floors, lowest first; a module imports from its own floor and those below. interop stands beside and knows all, but
# compat, adapters and the loading of backbones serve others.
FLOORS = [
    ("errors",),
    ("files", "limits", "ranks"),
    ("config",),
    ("settings",),
    ("presets", "run_folder", "interop.compat", "interop.threads"),
    ("model",),
    ("fast",),
    ("data",),
    ("classroom", "figures.run_figures", "figures.evaluation_figures"),
    (
        "interop.backbones",
        "interop.hub",
        "interop.packaged",
        "interop.timm_encoders",
        "interop.adapters",
        "interop.selfcheck",
    ),
    ("evaluation",),
    ("training",),
    (
        "interop",
        "figures",
        "demo",
        "commands",
        "classroom.pretraining",
        "classroom.pretrain_lm",
        "classroom.pretrain_clip",
        "__main__",
        "__init__",
    ),
]


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {name_of(file): file for file in FLAMINGO.rglob("*.py") if "__pycache__" not in file.parts}


def imported(file: Path, *, lazily: bool) -> set[str]:
    """Modules of flamingo that a file imports; lazily: also inside functions."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if lazily else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flamingo":
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in MODULES and MODULES[name].name != "__init__.py"}


def floor(module: str) -> int:
    inside = module.removeprefix("flamingo.")
    fitting = [(len(room), level) for level, rooms in enumerate(FLOORS) for room in rooms
               if inside == room or inside.startswith(f"{room}.")]  # fmt: skip
    return max(fitting)[1]


def test_every_module_has_a_floor_and_imports_only_from_below():
    wrong = [
        f"{module} imports {other}"
        for module, file in MODULES.items()
        for other in imported(file, lazily=False)
        if floor(other) > floor(module)
    ]
    assert wrong == []


def test_no_two_modules_import_each_other_not_even_lazily():
    """A circle, of any length, inside functions too: found by taking away what nobody needs until nothing is left."""
    needs = {module: imported(file, lazily=True) - {module} for module, file in MODULES.items()}
    while free := [module for module, others in needs.items() if not others]:
        for module in free:
            del needs[module]
        for others in needs.values():
            others.difference_update(free)
    assert needs == {}


def test_the_lesson_imports_torch_einops_transformers_and_what_is_below_it():
    allowed = {"torch", "einops", "transformers", "flamingo"}
    standard = {"collections", "contextlib", "dataclasses", "functools", "math", "typing"}
    for module, file in MODULES.items():
        if module.startswith("flamingo.model."):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                names = [node.module] if isinstance(node, ast.ImportFrom) else (
                    [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])  # fmt: skip
                assert {name.split(".")[0] for name in names} <= allowed | standard, (module, names)
            below = {
                "flamingo.config",
                "flamingo.errors",
                "flamingo.files",
                "flamingo.interop",
                "flamingo.interop.compat",
                "flamingo.interop.threads",
            }
            assert {other for other in imported(file, lazily=True) if not other.startswith("flamingo.model")} <= below


def test_from_the_model_to_its_loss_there_are_five_files_and_900_lines():
    files = ["vlm", "resampler", "cross_attention", "language_model", "added_tokens"]
    lines = {name: len((FLAMINGO / "model" / f"{name}.py").read_text().splitlines()) for name in files}
    assert sum(lines.values()) <= 900, lines
    # What `vlm` needs of model/ is these and the use of a trained model, which no loss needs.
    seen, todo = set(), {"flamingo.model.vlm"}
    while todo:
        module = todo.pop()
        seen.add(module)
        todo |= {other for other in imported(MODULES[module], lazily=False) if ".model." in other} - seen
    assert seen == {f"flamingo.model.{name}" for name in [*files, "generation"]}


def test_every_file_of_the_lesson_says_what_it_teaches():
    for module, file in MODULES.items():
        if module.startswith("flamingo.model.") or module.startswith("flamingo.fast."):
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
            assert text and (len(text) > 60), module
            if module.startswith("flamingo.fast.") and not module.endswith((".device", ".enable")):
                assert "Replaces:" in text, module
