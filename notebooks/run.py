"""Run the notebooks, each in a fresh kernel, and see that they still show what they showed.

    python notebooks/run.py            all; fails when a cell raises or a printed shape has changed
    python notebooks/run.py 02 05      only those whose name begins so
    python notebooks/run.py --write    save the new outputs

A printed shape is a list of whole numbers in round brackets, such as (2, 16, 192), or
torch.Size([2, 16, 192]). Losses, captions and figures may differ from machine to machine; shapes
may not.
"""

import argparse
import asyncio
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

HERE = Path(__file__).resolve().parent
SHAPE = re.compile(r"\(\d+(?:, \d+)*,?\)|torch\.Size\(\[[\d, ]*\]\)")
SECONDS = 180  # the longest a cell may take
# What would tell where a notebook was run → what is saved in its place.
PLACES = {str(HERE.parent): "..", sys.prefix: "(python)", str(Path.home()): "~"}


def texts(output) -> list[str]:
    """The plain text of an output of a cell: what was printed, or the value of its last line."""
    if output.output_type == "stream":
        return [output.text]
    return [output.data["text/plain"]] if "text/plain" in output.get("data", {}) else []


def shapes(notebook) -> list[tuple[int, list[str]]]:
    """(number of the cell, the shapes it printed) of every cell that printed any."""
    found = []
    for number, cell in enumerate(notebook.cells):
        printed = [text for output in cell.get("outputs", []) for text in texts(output)]
        if seen := SHAPE.findall(" ".join(printed)):
            found.append((number, seen))
    return found


def clean(notebook) -> None:
    """Take out what belongs to one machine and one moment."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if "outputs" in cell:  # what goes to stderr are warnings and progress bars
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            # Without a kernel a widget shows nothing; the still picture beside it remains.
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
            if output.output_type == "stream":
                output.text = _without_places(output.text)
            elif "text/plain" in output.get("data", {}):
                output.data["text/plain"] = _without_places(output.data["text/plain"])
            if "metadata" in output:
                output.metadata = {}


def _without_places(text: str) -> str:
    for place in sorted(
        PLACES, key=len, reverse=True
    ):  # the environment may lie inside the repository
        text = text.replace(place, PLACES[place])
    return text


def run(path: Path, write: bool) -> str | None:
    """Execute one notebook → what is wrong with it, None if nothing is."""
    notebook = nbformat.read(path, as_version=4)
    before = shapes(notebook)
    client = NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"], resources={"metadata": {"path": HERE}},
    )  # fmt: skip
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return f"a cell failed:\n{error}"
    after = shapes(notebook)
    if write:
        clean(notebook)
        nbformat.write(notebook, path)
        return None
    if before != after:
        differing = [
            f"  cell {number}: {seen}" for number, seen in after if (number, seen) not in before
        ]
        missing = [
            f"  cell {number}: {seen} (committed)"
            for number, seen in before
            if (number, seen) not in after
        ]
        return "\n".join(["other shapes than the committed ones:", *differing, *missing])
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names",
        nargs="*",
        help="beginnings of names, such as 03; all notebooks if none is given",
    )
    parser.add_argument(
        "--write", action="store_true", help="save the new outputs instead of comparing them"
    )
    args = parser.parse_args()
    if sys.platform == "win32":  # the default loop there cannot talk to a kernel
        asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())
    chosen = [
        path
        for path in sorted(HERE.glob("*.ipynb"))
        if path.name.startswith(tuple(args.names) or ("",))
    ]
    if not chosen:
        sys.exit(f"no notebook begins with {' or '.join(args.names)}")
    failed = 0
    for path in chosen:
        began = time.time()
        fault = run(path, args.write)
        failed += fault is not None
        print(f"{path.name}: {fault or 'ok'} ({time.time() - began:.0f} s)", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
