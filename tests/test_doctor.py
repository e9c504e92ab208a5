"""`paracomm doctor` must help most where something is missing."""

import json
import os
import subprocess
import sys

import pytest

from paracomm.cli import doctor, network


def report_where(missing: str) -> dict:
    """What doctor says, as a program reads it, where the module `missing` cannot be imported."""
    code = f"import sys; sys.modules[{missing!r}] = None; from paracomm.cli.doctor import doctor; doctor(json=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


def test_json_has_every_section() -> None:
    report = report_where("nothing")
    assert list(report) == ["build", "network", "cpu", "limits", "packages", "mpi"]
    assert report["build"]["extension"].endswith(".so")
    assert {"version", "compiler", "reduce_isa", "transports"} <= set(report["build"])
    assert report["build"]["gpus"] > 0 or report["build"]["why_no_gpu"]
    assert report["build"]["emulated_gpus"] == int(os.environ.get("PARACOMM_EMULATED_DEVICES", "8"))
    assert report["cpu"]["usable_cores"] >= 1
    assert report["limits"]["open_files"] > 0
    assert report["packages"]["numpy"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "go over device memory"),
        ("emulated", "emulated GPUs"),
        ("host", "through host memory"),
        ("gpu", "refuses this: PARACOMM_DEVICE is 'gpu'"),
    ],
)
def test_it_says_what_device_arrays_go_over(monkeypatch: pytest.MonkeyPatch, value: str, said: str) -> None:
    monkeypatch.setenv("PARACOMM_DEVICE", value)
    assert said in report_where("nothing")["build"]["devices"]


def test_a_missing_extension_is_named_with_its_reason() -> None:
    build = report_where("paracomm._C")["build"]
    assert build["extension"] is None
    assert "paracomm._C" in build["why"]


def test_the_table_shows_every_finding(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_where("nothing")  # who has looked for GPUs here could not fork ranks that use them
    doctor.print_tables(report)
    printed = capsys.readouterr().out
    for title, section in report.items():
        assert title in printed
        for name in section:
            assert name in printed


def test_loopback_route() -> None:
    assert network.route_to("127.0.0.1") == ("127.0.0.1", "lo")


def test_an_unknown_host_has_no_route() -> None:
    assert network.route_to("no.such.host.invalid") == (None, None)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("memory_bytes", 3 << 30, "3.0 GiB"),
        ("dev_shm_bytes", 64 << 20, "64.0 MiB"),
        ("locked_memory_bytes", None, "no limit"),
        ("interface", None, "-"),
        ("loopback_only", True, "yes"),
        ("features", ["avx2", "f16c"], "avx2, f16c"),
        ("caches", {"L1": "32K"}, "L1 32K"),
    ],
)
def test_findings_read_well(name: str, value: object, text: str) -> None:
    assert doctor.shown(name, value) == text
