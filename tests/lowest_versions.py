"""The base works at its lower bounds in pyproject.toml: `python -m tests.lowest_versions OUT`.

They are installed into OUT, once, and used with the torch that is there: the lowest one is not
tried, because its wheel brings gigabytes of CUDA libraries.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.launching import ROOT, environment
from tests.test_dependencies import USE


def lowest() -> list[str]:
    """`numpy==1.26` and so on, of the base without torch."""
    (block,) = re.findall(
        r"^dependencies = \[\n(.*?)^\]",
        (ROOT / "pyproject.toml").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    found = re.findall(r'"([\w-]+)>=([\d.]+)"', block)
    return [f"{name}=={bound}" for name, bound in found if name != "torch"]


def main(out: Path) -> None:
    wanted = " ".join(lowest())
    stamp = out / "installed"
    if not stamp.is_file() or stamp.read_text() != wanted:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run(
            [*pip, "--no-deps", "--upgrade", "--target", str(out), *lowest()], check=True
        )
        stamp.write_text(wanted)
    variables = environment() | {"PYTHONPATH": f"{out.resolve()}:{ROOT}"}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", USE], cwd=folder, env=variables, check=True)
    print(f"lowest versions: the base works with {wanted}", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
