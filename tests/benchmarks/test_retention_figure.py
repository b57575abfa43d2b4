"""The table and figure of retention results."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_figure_has_every_column_and_needs_no_jax(tmp_path):
    columns = runpy.run_path(str(BENCHMARKS / "retention.py"), run_name="imported")["COLUMNS"]
    values = {column: 0.5 + i / 8 for i, column in enumerate(columns)}
    training = {"steps": 3, "objective": "mixture"}
    rows = [
        {"name": "source", **values, "composed": None},
        {"name": "new", **values},
        {"name": "later", **values, "start": "new", "tokens": 3e6, "training": training},
    ]
    file = tmp_path / "retention.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    code = (
        "import runpy, sys; sys.modules['jax'] = None;"
        f" runpy.run_path({str(BENCHMARKS / 'retention_figure.py')!r}, run_name='__main__')"
    )
    out = ["--out", str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", code, f"A={file}", *out], check=True)
    head, _, source, new, later = (tmp_path / "out.md").read_text().split("\n\n")[1].splitlines()
    numbers = [f"{value:.3f}" for value in values.values()]
    assert len(head.split("|")) == len(later.split("|")) == len(columns) + 4
    assert new == f"| new |  | {' | '.join(numbers)} |"
    assert later == f"| later | 3.0M | {' | '.join(numbers)} |"
    assert source.count("|") == new.count("|") and (tmp_path / "out.png").stat().st_size > 1000
