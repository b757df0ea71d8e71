"""The benchmarks run, on tiny shapes: both sides do the same work, agree on the numbers, and leave
the JSON that is documented.
"""

import argparse
import importlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch

from tests.common.rounding import FORWARD, rounding

FOLDER = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture
def benchmark(monkeypatch):
    """A benchmark's module by name; its threads, and the names it imports, are put back."""
    before, threads = set(sys.modules), torch.get_num_threads()
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(FOLDER):
            del sys.modules[name]


def run(module, options: str, folder: Path) -> dict:
    """What the benchmark leaves in its JSON file."""
    module.main([*options.split(), "--out", str(folder)])
    return json.loads((folder / f"{module.__name__}.json").read_text())


def test_alternation_takes_turns_and_drops_the_warm_up(benchmark):
    calls = []
    common = benchmark("common")
    sides = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert common.alternate(sides, pairs=2, warmup=1) == {"a": [3, 5], "b": [4, 6]}
    assert calls == list("ababab")


def test_ratios_are_of_pairs(benchmark):
    of = benchmark("common").ratios([2.0, 9.0, 40.0], [1.0, 3.0, 10.0])
    assert of == {"median": 3.0, "q1": 2.5, "q3": 3.5, "min": 2.0, "max": 4.0, "n": 3}
    with pytest.raises(ValueError):
        benchmark("common").ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize("probability", [0.25, 0.02])
def test_stop_tokens_come_at_the_rate_that_was_asked_for(benchmark, probability):
    common = benchmark("common")
    torch.manual_seed(0)
    model = common.stopping(common.qwen3(32, 2, 64, initial=0.1), probability)
    with torch.no_grad():
        stop = model(torch.randint(2, 64, (8, 16))).logits.softmax(-1)[..., common.EOS]
    assert stop.mean().item() == pytest.approx(probability, rel=0.15)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    endless = common.stopping(model, 0.0)
    with torch.no_grad():
        assert endless(torch.randint(2, 64, (2, 16))).logits.softmax(-1)[..., common.EOS].max() == 0


def head_pass(benchmark, monkeypatch, folder, peer):
    head = benchmark("head")
    # a process takes seconds
    monkeypatch.setattr(head, "apart", lambda script, task, args: head.memory(task, args.device))
    (point,) = run(head, f"--shape 300 70 16 --peers {peer} --pairs 2", folder)["points"]
    assert (point["V"], point["N"], point["H"], point["left_out"]) == (300, 70, 16, {})
    assert point["gradient_bytes"] == 4 * 16 * (300 + 70)
    allowed = rounding(
        torch.float32, 8.0, 16 + 300
    )  # logits within 8 or so, sums of H products and of V entries
    for side in ("opdkit", peer):
        assert max(point[side]["relative_error"].values()) < allowed
        assert point[side]["of_floor"]["n"] == 2 and point[side]["extra_bytes"] >= 0
    assert point["opdkit"]["over_opdkit"]["median"] == 1.0


def test_head_agrees_with_the_dense_pass(benchmark, monkeypatch, tmp_path):
    head_pass(benchmark, monkeypatch, tmp_path, "dense")


@pytest.mark.peer
@pytest.mark.parametrize(("peer", "package"), [("trl", "trl"), ("liger", "liger_kernel")])
def test_head_agrees_with_a_peer(benchmark, monkeypatch, tmp_path, peer, package):
    pytest.importorskip(package)
    head_pass(benchmark, monkeypatch, tmp_path, peer)


def test_number_types_of_a_head(benchmark, tmp_path):
    """A head's products in bfloat16 are as exact as in float32; their results in it are not."""
    point = run(benchmark("head_types"), "--shape 500 20 48 --pairs 1", tmp_path)["point"]
    rounded, ours, head, whole = (point[s] for s in ("rounded", "bfloat16", "head", "float32"))
    for side in (ours, head, whole):
        assert side["logp"] < 1e-5 < 1e-3 < rounded["logp"] and side["ties"] == 0 < rounded["ties"]
        assert max(side["hidden_gradient"], side["head_gradient"]) < 5e-3
    assert rounded["hidden_gradient"] > 0.1 and ours["of_rounded"]["n"] == 1


def test_head_says_what_it_leaves_out(benchmark, monkeypatch, tmp_path):
    head = benchmark("head")
    monkeypatch.setattr(head, "apart", lambda *of: 0)
    (point,) = run(head, "--shape 300 70 16 --peers dense --limit 1e-6 --pairs 1", tmp_path)[
        "points"
    ]
    assert point["left_out"] == {"dense": "needs more than 1e-06 GiB"} and "dense" not in point


def test_sampler_writes_what_generate_writes(benchmark, tmp_path):
    small = (
        "--hidden 32 --layers 2 --vocab 64 --rollouts 16 --rows 8 --num-generations 2 --length 16 "
        "--pairs 2"
    )
    result = run(benchmark("sampler"), small, tmp_path)
    assert result["checks"]["greedy_tokens_identical"] == 8 * 16
    assert 0 <= result["checks"]["largest_logp_difference"] < FORWARD
    equal, few, all_ = result["cases"]
    assert (
        equal["opdkit"]["tokens"] == equal["generate"]["tokens"] == 2 * 8 * 16
        and equal["mean_length"] == 16
    )
    assert (few["rows"], all_["rows"]) == (8, 16)
    # the same seeds: no rollout depends on its batch
    assert few["opdkit"]["tokens"] == all_["opdkit"]["tokens"]
    assert few["ratio"]["generate"]["n"] == 2


def test_scaling_fits_exponents(benchmark, tmp_path):
    scaling = benchmark("scaling")
    assert scaling.exponent([1, 10, 100], [3, 30, 300]) == pytest.approx(1)
    assert scaling.exponent([2, 4, 8], [1, 4, 16]) == pytest.approx(2)
    small = (
        "--hidden 32 --rollouts 4 --length 4 --vocab 64 --most-tokens 64 --most-vocab 128 "
        "--rounds 1 --term-rounds 2"
    )
    result = run(scaling, small, tmp_path)
    assert {s["vary"]: s["values"] for s in result["sweeps"]} == {
        "rollouts": [1, 4, 16],
        "length": [1, 4, 16],
        "long responses": [4, 16],
        "vocabulary": [32, 128],
        "group": [1, 4],
    }
    assert result["sweeps"][0]["tokens"] == [4, 16, 64]
    assert all(set(s["exponent"]) == {"step", "sample", "score", "learn"} for s in result["sweeps"])
    first, second, third = result["terms"].values()
    assert (
        "over_previous" not in first
        and second["over_previous"]["step"]["n"] == third["over_previous"]["learn"]["n"] == 2
    )


@pytest.mark.peer
def test_vs_trl_compares_equal_work(benchmark, tmp_path):
    pytest.importorskip("trl")
    small = (
        "--rollouts 16 --length 12 --vocab 64 --steps 2 --pairs 2 --loss-tolerance 0.2 --no-memory"
    )
    result = run(benchmark("vs_trl"), small, tmp_path)
    assert result["ratio"]["n"] == 2
    for side in ("opdkit", "trl"):
        of = result[side]
        assert of["rollouts"] == 2 * 2 * 16 and 2 * 2 * 16 < of["tokens"] < 2 * 2 * 16 * 12
        assert set(of["microseconds_per_token"]) == {"sample", "score", "learn", "other"}
        assert min(of["microseconds_per_token"].values()) > 0


def test_episodes_and_single_turns_write_as_much(benchmark, tmp_path):
    small = (
        "--hidden 32 --layers 2 --vocab 64 --episodes 8 --turns 3 --turn-length 6 --pairs 2 "
        "--answer-length 4"
    )
    result = run(benchmark("episodes"), small, tmp_path)
    assert 0 <= result["largest_logp_difference"] < FORWARD
    assert result["turns"] == 3 and result["ratio"]["n"] == 2
    # two answers of 2 to 6 words, each with two marks of the template, or three where it closed
    assert 2 * 4 <= result["others_tokens"] <= 2 * 9


SIDE = """
import json, sys
print(json.dumps({"opdkit": WHERE}), flush=True)
for n, line in enumerate(sys.stdin):
    turn = {"seconds": SECONDS, "learn": SECONDS / 2, "losses": [1.0 / (n + 1) + OFF]}
    print(json.dumps(turn | {"sample": 0.0, "reward": 0.0, "score": 0.0}), flush=True)
"""


def sides(folder, seconds, off=0.0, moved=False):
    """Two checkouts whose steps take so long."""
    checkouts = []
    for name, took in zip(("old", "new"), seconds):
        home = folder / name
        python = home / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        where = folder / "elsewhere" if moved and name == "new" else home
        said = SIDE.replace("WHERE", repr(str(where / "opdkit" / "__init__.py")))
        said = said.replace("SECONDS", str(took)).replace("OFF", str(off * (name == "new")))
        (home / "side.py").write_text(said)
        python.write_text(f"#!/bin/sh\nexec {sys.executable} {home / 'side.py'}\n")
        python.chmod(0o755)
        checkouts.append(str(home))
    return checkouts


def test_two_checkouts_take_turns_and_are_compared(benchmark, tmp_path):
    step = benchmark("step")
    options = [*sides(tmp_path, (2.0, 3.0)), "--pairs", "3", "--out", str(tmp_path)]
    found = step.main(options)["sizes"]
    assert set(found) == {"tiny", "medium"}
    for size in found.values():
        assert size["seconds"]["ratio"] == {**size["seconds"]["ratio"], "median": 1.5, "n": 3}
        assert size["learn"]["old"]["median"] == 1.0 and "sample" not in size


def test_two_checkouts_that_learn_otherwise_are_not_compared(benchmark, tmp_path):
    step = benchmark("step")
    with pytest.raises(SystemExit, match="of the same step differ"):
        step.main([*sides(tmp_path, (1.0, 1.0), off=1e-3), "--out", str(tmp_path)])


def test_a_side_must_be_of_its_checkout(benchmark, tmp_path):
    step = benchmark("step")
    with pytest.raises(SystemExit, match="is not of the checkout"):
        step.main([*sides(tmp_path, (1.0, 1.0), moved=True), "--out", str(tmp_path)])


def test_a_side_takes_the_steps_it_is_asked_for(benchmark):
    step = benchmark("step")
    out = io.StringIO()
    step.side(argparse.Namespace(seed=0, device="cpu"), ["tiny 2", "tiny 1"], out)
    _, two, one = map(json.loads, out.getvalue().splitlines())
    assert len(two["losses"]) == 2 and len(one["losses"]) == 1
    assert two["seconds"] >= two["sample"] + two["score"] + two["learn"] > 0
    assert one["losses"][0] not in two["losses"]  # it goes on from there


def test_early_scoring_writes_the_same_rollouts_on_both_sides(benchmark, tmp_path):
    """A teacher so slow that all is waited for: the step takes at most as long as in turn."""
    early = benchmark("early_scoring")
    small = "--hidden 32 --layers 1 --rollouts 4 --length 12 --mean 6 --pairs 2 --shares 1"
    [line] = run(early, small, tmp_path)["shares"]
    assert line["tokens"] > 0 and set(line["seconds"]) == set(early.SIDES)
    assert all(line["seconds"][side]["median"] > 0 for side in early.SIDES)
