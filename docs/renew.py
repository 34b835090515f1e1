"""Renews what is made by running: the pictures of README, and the outputs of the notebooks.

python docs/renew.py pictures     # needs chromium; CHROMIUM names another browser
python docs/renew.py notebooks    # needs the extra `notebook`
"""

import argparse
import copy
import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TRACED = 'Shuffle this list: ["Ada", "Ben", "Carl", "Zoe"].'
STEP = 2  # of the traced decode, the one that the picture shows: drafts are struck out
WIDTH = 90  # columns of the terminal in the picture


def pictures() -> None:
    """Write docs/demo.svg, the end of `apd demo` in a terminal, and docs/trace.png, the trace player in a browser."""
    from rich.console import Console

    from apd import APDSampler
    from apd.cli import demo
    from apd.show.text import legend

    sampler = APDSampler.from_included()
    comparisons = list(demo.compare(sampler))
    screen = Console(
        record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor", highlight=False
    )
    screen.print("$ apd demo", style="bold")
    screen.print(legend(colour=True))
    for comparison in comparisons[3:6]:
        demo.play(comparison, screen, animate=False)
    screen.print()
    screen.print(demo.table(comparisons))
    drawn = screen.export_svg(title="apd demo", unique_id="apd")
    drawn = re.sub(r"@font-face \{.*?\}\n", "", drawn, flags=re.DOTALL)  # no requests to other sites
    (ROOT / "docs" / "demo.svg").write_text(drawn, "utf-8")

    inputs = sampler.tokenizer([TRACED], return_tensors="pt")
    output = sampler.generate(**inputs, max_new_tokens=32, return_dict_in_generate=True)
    browser = os.environ.get("CHROMIUM", "chromium")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "trace.html")
        output.trace.to_html(page)
        move = f"var s = document.querySelector('input'); s.value = {STEP}; s.dispatchEvent(new Event('input'));"
        page.write_text(f"{page.read_text('utf-8')}<script>{move}</script>", "utf-8")
        shot = f"--screenshot={ROOT / 'docs' / 'trace.png'}"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=820,200"]
        subprocess.run([browser, *options, shot, f"file://{page}"], check=True, capture_output=True)


def sources(notebook: Any) -> str:
    """A hash of the code cells: outputs with another one are out of date."""
    return hashlib.sha256(
        "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code").encode()
    ).hexdigest()


def notebooks() -> None:
    """Run every notebook and keep its outputs."""
    import nbclient
    import nbformat

    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        notebook = run(notebook, nbclient)
        notebook.metadata["outputs_of"] = sources(notebook)
        nbformat.write(notebook, path)
        print(path.name, f"{path.stat().st_size / 1000:.0f} kB", flush=True)


def run(notebook: Any, nbclient: Any) -> Any:
    """A copy with the outputs of a run, without what differs from run to run."""
    notebook = copy.deepcopy(notebook)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": folder, "TQDM_DISABLE": "1"}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
        client = nbclient.NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}, record_timing=False
        )
        client.execute(env=environment)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    notebook.metadata.pop("widgets", None)
    return notebook


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pictures", "notebooks"))
    sys.path.insert(0, str(ROOT))
    {"pictures": pictures, "notebooks": notebooks}[parser.parse_args().what]()
