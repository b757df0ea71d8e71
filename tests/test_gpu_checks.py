"""benchmarks/gpu: every check runs in small shapes on the CPU, and one that fails, hangs or ends
its process is told of and stops no other.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = str(Path(__file__).parents[1] / "benchmarks")
ALONE = ("kernels", "rankings", "number types", "memory of the pass", "equal models", "ahead")


@pytest.fixture
def gpu(monkeypatch):
    """The script's modules by name; its threads, and the names it imports, are put back."""
    before, path, threads = dict(sys.modules), list(sys.path), torch.get_num_threads()
    for file in Path(FOLDER).rglob("*.py"):  # others of that name, as methods' files may have
        sys.modules.pop(file.stem, None)
    sys.path[:0] = [f"{FOLDER}/gpu", FOLDER]
    yield importlib.import_module
    sys.path[:] = path
    torch.set_num_threads(threads)
    for name in list(sys.modules):
        if str(getattr(sys.modules[name], "__file__", "")).startswith(FOLDER):
            del sys.modules[name]
    sys.modules.update({name: module for name, module in before.items() if name not in sys.modules})


def checked(module, folder, *names, **more):
    """The outcome of each check, as the JSON file has them."""
    told = [x for name, value in more.items() for x in (f"--{name}", str(value))]
    module.main(
        ["--small", "--device", "cpu", "--inside", "--out", str(folder), *told, "--only", *names]
    )
    whole = json.loads((folder / "gpu.json").read_text())
    return {c["name"]: c for c in whole["checks"]}


def test_checks_of_one_process_pass_in_small_shapes(gpu, tmp_path, capsys):
    found = checked(gpu("all"), tmp_path, *ALONE)
    assert {name: c["result"] for name, c in found.items()} == dict.fromkeys(ALONE, "pass"), found
    assert found["kernels"]["figures"]["ReverseKL()"] < 1e-5
    assert found["equal models"]["figures"] == {"opd": 0.0, "forward KL": 0.0}
    assert "kernels" in capsys.readouterr().out


def test_a_wrong_kernel_is_found(gpu, tmp_path, monkeypatch):
    arithmetic = gpu("arithmetic")
    right = arithmetic.divergence
    monkeypatch.setattr(arithmetic, "divergence", lambda *a: right(*a) * (1 + 1e-4))
    found = checked(gpu("all"), tmp_path, "kernels", "rankings")
    assert (found["kernels"]["result"], found["rankings"]["result"]) == ("fail", "pass")
    assert "further than 2e-05 from float64" in found["kernels"]["reason"]


def test_what_cannot_be_done_here_says_why(gpu, tmp_path, monkeypatch):
    engines, ranks, setting = gpu("engines"), gpu("ranks"), gpu("setting")
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    found = checked(gpu("all"), tmp_path, "vLLM engine", "vLLM server", "quantised", "Ray")
    assert {c["result"] for c in found.values()} == {"skip"}
    assert all("is not installed: pip install" in c["reason"] for c in found.values())
    with pytest.raises(setting.Skip, match="needs 2 GPUs, here is 1"):
        ranks.equality(setting.Setting("cuda", True, 1, tmp_path))
    late = checked(gpu("all"), tmp_path, "kernels", budget=0)
    assert "no time is left of 0 s" in late["kernels"]["reason"]


WORKER = """
import json, os, sys, time
print("told: ready", flush=True)
for name in sys.argv[sys.argv.index("--only") + 1:]:
    if name == "dies":
        print("out of memory", file=sys.stderr, flush=True)
        os._exit(1)
    if name == "hangs":
        time.sleep(60)
    told = {"name": name, "result": "pass", "seconds": 0.1, "reason": "", "figures": {}}
    print("noise", flush=True)
    print("told: " + json.dumps(told), flush=True)
"""


def test_one_that_dies_or_hangs_stops_no_other(gpu, tmp_path, monkeypatch, capsys):
    every, setting = gpu("all"), gpu("setting")
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(every, "__file__", str(script))
    monkeypatch.setattr(every, "LEAST", 0.0)
    monkeypatch.setattr(every, "GRACE", 0.1)
    seconds = {"first": 30.0, "dies": 30.0, "second": 30.0, "hangs": 0.25, "last": 30.0}
    checks = [setting.Check(name, "", most, lambda s: {}) for name, most in seconds.items()]
    args = argparse.Namespace(budget=100.0, threads=None)
    outcomes = every.apart(args, checks, setting.Setting("cpu", True, 0, tmp_path))
    assert [(o.name, o.result) for o in outcomes] == [
        ("first", "pass"),
        ("dies", "fail"),
        ("second", "pass"),
        ("hangs", "fail"),
        ("last", "pass"),
    ]
    assert "out of memory" in outcomes[1].reason and "longer than 1 s" in outcomes[3].reason


def test_every_check_has_its_place(gpu):
    every = gpu("all")
    assert set(every.ORDER) == set(every.NAMED) and len(set(every.ORDER)) == len(every.ORDER)


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["processes", "resume", "speed of processes"])
def test_checks_of_several_processes_pass_by_gloo(gpu, tmp_path, name):
    found = checked(gpu("all"), tmp_path, name)
    assert found[name]["result"] == "pass", found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step", "offload", "quantised"])
def test_checks_of_one_process_that_take_longer(gpu, tmp_path, name):
    found = checked(gpu("all"), tmp_path, name)
    assert found[name]["result"] == "pass", found


@pytest.mark.ray
def test_a_trainer_and_a_sampler_as_actors(gpu, tmp_path):
    pytest.importorskip("ray")
    found = checked(gpu("all"), tmp_path, "Ray")
    assert found["Ray"]["result"] == "pass", found
