"""The comparison of benchmarks/agents: walkthroughs are written as episodes write them, KL is of
the turns that it is said to be of, and the page shows what was measured.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from opdkit.environments import Dialogue, EpisodeSampler
from opdkit.sampling import HFSampler
from opdkit.types import Prompt, Rollout, Sampling
from tests.common.tiny import tiny_model, tiny_tokenizer
from tests.environments.test_depth_of_episodes import EXPERT, Counting

FOLDER = str(Path(__file__).parents[2] / "benchmarks" / "agents")


@pytest.fixture
def part(monkeypatch):
    """A file of the comparison, by name."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(FOLDER):
            del sys.modules[name]


def test_a_walkthrough_is_learnt_as_an_episode_is_written(part):
    """What the replay of an episode writes is the beginning of it, byte for byte."""
    tokenizer = tiny_tokenizer()
    world: ModuleType = part("world")
    game, said = Counting(9), []
    said.append(game.reset({}, 0))
    for action in EXPERT:
        said += [action, game.step(action)]
    ids, own = world.written(said, Dialogue(tokenizer))
    sampler = EpisodeSampler(
        HFSampler(tiny_model("qwen3"), tokenizer), Dialogue(tokenizer), lambda: Counting(9)
    )
    prompt = Prompt("game", [], replay=EXPERT[:7])
    [rollout] = sampler.sample([prompt], Sampling(max_completion_length=400), seed=0)
    given = rollout.marks["given"]
    until = rollout.trained.index(True)
    start = len(rollout.prompt)
    assert ids[: start + until] == rollout.prompt + rollout.tokens[:until]
    assert own[start : start + until] == given[:until] and not any(own[:start])
    batch, labels = world.batch_of([said, said[:3]], Dialogue(tokenizer))
    assert labels[0][torch.tensor(own)].tolist() == [i for i, o in zip(ids, own) if o]
    shown = labels != world.IGNORED
    assert int(shown[0].sum()) == sum(own) and (batch[shown] == labels[shown]).all()
    assert int(shown[1].sum()) == len(Dialogue(tokenizer).action(EXPERT[0]))


def test_kl_by_turn(part):
    """Against sums token by token; others' tokens, and padding, are of no turn."""
    student, teacher = tiny_model("qwen3", seed=1), tiny_model("qwen3", seed=2)
    rollouts = [
        Rollout(
            "a", [5, 6], [7, 8, 9, 10, 11], [True, True, False, True, True], [0.0] * 5, [0.0] * 5,
            "a", marks={"tool": [False, False, True, False, False]}, turns=[0, 0, 0, 1, 1],
        ),
        Rollout("b", [3], [4, 12], [True, True], [0.0] * 2, [0.0] * 2, "b", turns=[0, 0]),
    ]  # fmt: skip
    sums, counts = part("measure").kl_by_turn(rollouts, student, teacher, pad=0)
    expected = [0.0, 0.0]
    for r in rollouts:
        ids = torch.tensor([r.prompt + r.tokens])
        with torch.no_grad():
            s, t = (m(ids).logits[0].log_softmax(-1) for m in (student, teacher))
        for i, (turn, mine) in enumerate(zip(r.turns, r.drawn)):
            at = len(r.prompt) + i - 1
            expected[turn] += float((s[at].exp() * (s[at] - t[at])).sum()) if mine else 0.0
    assert counts == [4, 2] and sums == pytest.approx(expected, rel=1e-5)


def what(success: float, kl: list[float]) -> dict:
    won = {"a": success, "b": success}
    return {"won": won, "kl": kl, "turns": 2.0, "tokens": [4] * len(kl), "success": success}


def test_the_page(part, tmp_path):
    page = part("page")
    start = {"teacher": what(1.0, [0.0]), "student": what(0.25, [1.0, 2.0])}
    (tmp_path / "start.json").write_text(json.dumps(start))
    for method, end in (("opd", 0.5), ("tcod f2b", 0.75)):
        for seed in (0, 1):
            curve = {0: start["student"], 10: what(end, [0.25, 0.75])}
            name = f"{method.replace(' ', '-')}-{seed}.json"
            kept = {"method": method, "seed": seed, "curve": curve}
            (tmp_path / name).write_text(json.dumps(kept))
    path = page.write_page(tmp_path, ["opd", "tcod f2b", "tcod b2f"], 4)
    text = path.read_text()
    assert "wins 100% of its episodes, the student 25%" in text and "KL by turn" in text
    first, second = json.loads((tmp_path / "result.json").read_text())["table"]
    assert (first["method"], first["success"], first["by seed"]) == ("opd", "50.0 %", "50, 50")
    assert second["against opd, paired"].startswith("+25.0 (")
    assert second["KL by turn"] == "0.25 0.75" and second["KL per token, nats"] == "0.500"
