"""The table of `make gpu`, on the CPU with tiny shapes: what it says, and what stops none of it."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import gpu
import pytest
from helpers import REPOSITORY

SCRIPT = REPOSITORY / "benchmarks" / "gpu.py"
BAD = """
import os, sys, time
import gpu

def raises(job):
    job.row("before", 1.5, "s")
    raise RuntimeError("out of luck | or so")

def sleeps(job):
    job.row("before", 2.5, "s", 5.0)
    time.sleep(600)

def dies(job):
    os.kill(os.getpid(), 9)

def leaves(job):
    sys.exit(3)

def lacks(job):
    import no_such_library

def goes_on(job):
    with job.attempt("one shape"):
        raise MemoryError("no room")
    job.row("another", 3.5, "s")

found = (raises, sleeps, dies, leaves, lacks, goes_on)
gpu.SECTIONS = {one.__name__: gpu.Section(one, 4 if one is sleeps else 60) for one in found}
gpu.main()
"""


def table(folder: Path, script: Path, *options: str) -> tuple[list[dict[str, Any]], str, dict[str, Any]]:
    """The rows that a script writes, what it prints, and what it says of the device."""
    places = os.pathsep.join([str(SCRIPT.parent), str(REPOSITORY)])
    environment = os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(script),
        "--device",
        "cpu",
        "--small",
        "--out",
        str(folder / "out"),
        *options,
    ]
    command += ["--packs", str(folder)]
    done = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=300
    )
    written = json.loads((folder / "out" / "gpu.json").read_text())
    page = (folder / "out" / "gpu.md").read_text()
    for row in written["rows"]:
        line = next(
            line for line in page.splitlines() if line.startswith(f"| {row['section']} | {row['what']} |")
        )
        assert line in done.stdout
    return written["rows"], done.stdout, written["device"]


def test_sections_measure_what_a_cpu_can_show(tmp_path: Path) -> None:
    """What needs CUDA says so and has no value; what else is measured has one."""
    rows, _, device = table(tmp_path, SCRIPT, "--only", "device,parity,kernels")
    assert {row["section"] for row in rows} == {"device", "parity", "kernels"}
    assert device["name"] is device["driver"] is None
    assert device["torch"]
    assert device["cudnn_tf32"] in (True, False)
    for row in rows:
        assert not row["note"].startswith(("failed", "missing", "left out", "stopped", "ended")), row
        assert (row["value"] is None) == row["note"].startswith(gpu.NEEDS_CUDA), row
        assert row["ratio"] is None or row["ratio"] == pytest.approx(row["beside"] / row["value"])
    found = {row["what"]: row for row in rows}
    for name in ("quickstart", "sana", "sana-0.6b", "finetune-1.6b"):
        assert 0 < found[f"{name}: float32, TF32 off"]["value"] < 1e-5
        assert 0 < found[f"{name}: gradient, fp32"]["value"] < 1e-5
        assert 1e-5 < found[f"{name}: bf16 weights"]["value"] < 0.1
        assert found[f"{name}: bf16 autocast"]["value"] < 0.1, "float32 where a CPU would emulate it"
    for what in ("products in TF32", "pinned copies", "sana: float32, TF32 on"):
        assert found[what]["value"] is None


def test_a_section_that_ends_badly_leaves_the_others(tmp_path: Path) -> None:
    script = tmp_path / "bad.py"
    script.write_text(BAD)
    rows, printed, _ = table(tmp_path, script)
    assert [(row["section"], row["what"], row["value"], row["note"]) for row in rows] == [
        ("raises", "before", 1.5, ""),
        ("raises", "the rest", None, "failed: RuntimeError: out of luck | or so"),
        ("sleeps", "before", 2.5, ""),
        ("sleeps", "the rest", None, "stopped after 4 s"),
        ("dies", "the rest", None, "ended by signal 9"),
        ("leaves", "the rest", None, "ended with exit code 3; see leaves.log"),
        ("lacks", "all of it", None, "missing: no_such_library"),
        ("goes_on", "one shape", None, "failed: MemoryError: no room"),
        ("goes_on", "another", 3.5, ""),
    ]
    assert [row["ratio"] for row in rows if row["beside"]] == [2.0]
    assert "out of luck / or so" in printed, "a bar would be another column"
    assert "no room" in (tmp_path / "out" / "goes_on.log").read_text()
    rows, *_ = table(tmp_path, script, "--budget", "1", "--only", "raises,lacks")
    assert [(row["section"], row["value"], row["note"]) for row in rows] == [
        (name, None, "left out: no time") for name in ("raises", "lacks")
    ]


def test_there_is_no_table_of_a_section_that_is_not_there() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--only", "speed"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no section speed; there are device, parity" in done.stderr


def wheel(folder: Path, name: str, *needs: str) -> None:
    """A wheel with one module, one folder of tests and these requirements."""
    about = f"{name}-1.0.dist-info"
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        "Version: 1.0",
        *(f"Requires-Dist: {need}" for need in needs),
    ]
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")
        archive.writestr(f"{name}/tests/__init__.py", "")
        archive.writestr(f"{about}/METADATA", "\n".join([*lines, "", "Requires-Dist: not-a-need"]))
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")


def test_a_pack_has_what_the_libraries_need_but_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the Python there: a requirement of this one alone is left out."""
    pytest.importorskip("packaging")
    wheel(
        tmp_path, "alpha", "beta>=0.5", "torch>=2", "gamma; python_version < '3.12'", "delta; extra == 'more'"
    )
    wheel(tmp_path, "beta", "nvidia-cudnn-cu12")
    monkeypatch.setattr(gpu, "LIBRARIES", ("alpha",))
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "PIP_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    made = gpu.pack(tmp_path / "packs", "3.12")
    with tarfile.open(made) as archive:
        names = {Path(name).as_posix() for name in archive.getnames()}
    assert {"alpha/__init__.py", "beta/__init__.py", "alpha-1.0.dist-info/METADATA"} <= names
    assert not any("tests" in name for name in names)
    assert [path.name for path in (tmp_path / "packs").iterdir()] == ["packages-3.12.tar.xz"]


def test_a_pack_is_used_by_the_python_that_it_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "unpacked"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "unpacked").mkdir()
    (tmp_path / "module.py").write_text("")
    assert gpu.unpacked(tmp_path) == []
    version = ".".join(map(str, sys.version_info[:2]))
    for name in ("0.1", version):
        with tarfile.open(tmp_path / f"packages-{name}.tar.xz", "w:xz") as archive:
            archive.add(tmp_path / "module.py", f"for_{name}.py")
    (there,) = gpu.unpacked(tmp_path)
    assert [path.name for path in Path(there).iterdir()] == [f"for_{version}.py"]
    assert gpu.unpacked(tmp_path) == [there], "once"
