"""What is installed: the package alone, under a licence expression, with the dependencies that Debian 12 has."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())
DEBIAN_12 = {"click": "8.1.3", "pyfuse3": "3.2.1", "rich": "13.3", "trio": "0.22", "xattr": "0.10", "zstandard": "0.20"}


def test_the_project_says_what_installers_will_ask_for() -> None:
    project = PROJECT["project"]
    assert project["license"] == "MIT"
    assert project["license-files"] == ["LICENSE"]
    assert dict(line.split(">=") for line in project["dependencies"]) == DEBIAN_12
    assert set(project["scripts"]) == {"vzfs"}


@pytest.mark.slow
def test_built_distributions(tmp_path: Path) -> None:
    """The wheel has vzfs and nothing else, the source distribution all that the README speaks of."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=TOP, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no checkout")
    checkout = tmp_path / "checkout"
    for name in listed.stdout.splitlines():
        if (TOP / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(TOP / name, checkout / name)
    build = "import setuptools.build_meta as b, sys; out = sys.argv[1]; b.build_sdist(out); b.build_wheel(out)"
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    got = subprocess.run(
        [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *PROJECT["build-system"]["requires"]],
        capture_output=True,
        text=True,
    )
    if got.returncode:
        pytest.skip(f"setuptools can't be had: {got.stderr[-200:]}")
    done = subprocess.run(
        [python, "-W", "error::DeprecationWarning:setuptools", "-c", build, tmp_path],
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Deprecat" not in done.stderr, done.stderr

    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"vzfs"}
    assert "vzfs/py.typed" in names
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "README.md",
        "LICENSE",
        "docs/commands.md",
        "benchmarks/report/page.html",
        "tools/install",
        "requirements.lock",
        "tests/conftest.py",
    }
    assert wanted - packed == set()
