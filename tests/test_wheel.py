"""An installed wheel runs from any folder: configs, demo model and pictures travel with it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from command_line import CHECKOUT


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_installed_wheel_runs_elsewhere(tmp_path: Path) -> None:
    """Built without the network, unpacked into a folder of its own, started in another one."""
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(CHECKOUT)],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 10_000_000
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")} == {"pipeline"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import pipeline.__main__ as main; "
        f"assert main.__file__.startswith({str(site)!r}); sys.exit(main.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "run", "dataset.max_rows=8"],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 of 8 done" in done.stdout
    assert (elsewhere / "outputs" / "demo" / "data" / "part-00000.parquet").is_file()
