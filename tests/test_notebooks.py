"""The committed notebooks: what a reader sees without running them. (.ci/run executes them, by notebooks/run.py.)"""

import ast
import importlib.util
import itertools
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LINK = re.compile(r"\[([^\]]*)\]\(([^)#]+)\)")
ABSOLUTE = re.compile(r"(?<![\w.)])/(?:home|root|tmp|opt|usr|var|work|mnt|Users)/|[A-Z]:\\")

spec = importlib.util.spec_from_file_location("run", FOLDER / "run.py")
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def cells(notebook, kind):
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def printed(notebook):
    return [text for cell in cells(notebook, "code") for output in cell.outputs for text in run.texts(output)]


def test_there_are_nine_in_order_and_each_leads_to_the_next():
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{i:02}_" for i in range(1, 10)]
    for path, following in itertools.pairwise(NOTEBOOKS):
        assert f"({following.name})" in path.read_text()
        assert f"({path.name})" in following.read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_small(path):
    assert path.stat().st_size < 500_000


def test_it_was_run_from_top_to_bottom_without_an_error(notebook):
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in cells(notebook, "code")]
    assert counts == list(range(1, len(counts) + 1))
    assert not [o for cell in cells(notebook, "code") for o in cell.outputs if o.output_type == "error"]


def test_the_first_cell_says_the_versions(notebook):
    first = cells(notebook, "code")[0]
    said = "".join(text for output in first.outputs for text in run.texts(output))
    assert all(re.search(rf"{name} \d", said) for name in ("Python", "torch", "transformers", "open_clip"))


def test_shapes_are_printed_and_asserted(notebook):
    assert len(run.shapes(notebook)) >= 3
    asserting = [cell for cell in cells(notebook, "code") if "assert " in cell.source]
    assert len(asserting) >= 5


def test_cells_are_short(notebook):
    assert [cell.source for cell in cells(notebook, "code") if len(cell.source.splitlines()) > 14] == []


def test_exercises_have_folded_solutions(notebook):
    text = "\n".join(cell.source for cell in cells(notebook, "markdown"))
    exercises = text.partition("## Exercises")[2]
    asked = re.findall(r"^\*\*\d\.\*\*", exercises, flags=re.MULTILINE)
    assert 2 <= len(asked) <= 3
    assert exercises.count("<details><summary>Solution</summary>\n\n") == len(asked) == exercises.count("</details>")
    for code in re.findall(r"```python\n(.*?)```", exercises, flags=re.DOTALL):
        ast.parse(code)


def test_links_lead_to_files_that_hold_what_they_name(notebook):
    text = "\n".join(cell.source for cell in cells(notebook, "markdown"))
    found = [(name, target) for name, target in LINK.findall(text) if not target.startswith("http")]
    assert found
    for name, target in found:
        file = FOLDER / target
        assert file.is_file(), target
        for code in re.findall(r"`([A-Za-z_.]+)`", name) if file.suffix == ".py" else []:
            if not code.endswith(".py"):
                what = code.split(".")[-1]
                assert re.search(rf"(?:def|class) {what}\b|^{what} = ", file.read_text(), re.MULTILINE), (name, target)


def test_nothing_tells_where_it_was_run(notebook):
    said = [*printed(notebook), *(cell.source for cell in notebook.cells)]
    assert [text for text in said if ABSOLUTE.search(text)] == []
    assert not [cell.id for cell in notebook.cells if cell.metadata]


# ------------------------------------------------------------------------------------------------ notebooks/run.py
def small_notebook(path: Path, source: str, committed: str) -> Path:
    cell = new_code_cell(source, outputs=[new_output("stream", name="stdout", text=committed)], execution_count=1)
    nbformat.write(new_notebook(cells=[cell]), path)
    return path


def test_run_compares_shapes_and_nothing_else(tmp_path):
    path = small_notebook(tmp_path / "a.ipynb", "print('loss', 1.5, (2, 16, 192))", "loss 1.4 (2, 16, 192)\n")
    assert run.run(path, write=False) is None
    path = small_notebook(tmp_path / "b.ipynb", "print('loss', 1.5, (2, 16, 192))", "loss 1.5 (2, 8, 192)\n")
    assert "(2, 16, 192)" in run.run(path, write=False)


def test_run_reports_a_cell_that_fails_and_leaves_the_file_alone(tmp_path):
    path = small_notebook(tmp_path / "a.ipynb", "assert (1, 2) == (1, 3)", "")
    before = path.read_bytes()
    assert "AssertionError" in run.run(path, write=True)
    assert path.read_bytes() == before


def test_saved_outputs_do_not_name_the_machine(tmp_path):
    path = small_notebook(tmp_path / "a.ipynb", "import sys\nprint(sys.prefix)\nprint('oh', file=sys.stderr)", "")
    assert run.run(path, write=True) is None
    saved = nbformat.read(path, as_version=4)
    assert printed(saved) == ["(python)\n"]


def test_a_saved_widget_is_its_still_picture():
    forms = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "image/png": "x", "text/plain": "still"}
    cell = new_code_cell("show()", outputs=[new_output("display_data", data=forms)], execution_count=1)
    notebook = new_notebook(cells=[cell])
    run.clean(notebook)
    assert notebook.cells[0].outputs[0].data == {"image/png": "x", "text/plain": "still"}
