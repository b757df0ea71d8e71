"""Two and three processes, by gloo, find what one finds: gradients, metrics and weights."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opdkit.base.files import read_lines
from opdkit.methods.method import load, methods
from tests.common.other_tokenizers import sentencepiece
from tests.common.tiny import save_tiny, tiny_model
from tests.end_to_end.conftest import Shop, gsm8k_rows, write_rows
from tests.end_to_end.ranks import main

ROOT = Path(__file__).parents[2]
NOISE = ("seconds/", "memory/", "tokens_per_second/", "mfu/", "early/")
MOST = {"gradients": 1e-12, "metrics": 1e-12, "weights": 1e-12}
# of what an AdamW of its own learns beside the student: it divides by gradients that are rounding
BESIDE = 1e-11
SEEN = {"timeout": 900, "capture_output": True, "text": True, "cwd": ROOT}


@pytest.fixture(scope="session")
def data(shop: Shop) -> str:
    """Rows with everything a method may read, some of them much longer than others."""
    shown = {"hint": "add them", "allowed": ["numbers"], "disallowed": ["names"]}
    shown |= {"chosen": " They are added.", "rejected": " Perhaps."}
    rows = [
        {**row, **shown, "response": f" {i + 1}" * (i % 3 + 1)}
        for i, row in enumerate(gsm8k_rows(6))
    ]
    rows[1]["question"] *= 4
    return write_rows(shop.folder / "ranks.jsonl", rows)


def values(shop: Shop, data: str, folder: Path, method: str, **settings: Any) -> dict[str, Any]:
    """Two steps of a run in float64."""
    made = load(method)
    unnamed = [name for name, said in made.models.items() if set(said) <= {"view"}]
    soup = "kind" in made.models.get("reference", {})
    out: dict[str, Any] = {
        "student": shop.student,
        "teacher": shop.teacher,
        "data": data,
        "method": method,
        "reward": shop.reward,
        "output": str(folder),
        "dtype": "float64",
        "device": "cpu",
        "steps": 2,
        "prompts_per_step": 3,
        "keep_samples": 0,
        "sampling": {"num_generations": 2, "max_completion_length": 6},
        # AdamW divides what is but rounding, where a gradient is zero, by no less than eps
        "optim": {"learning_rate": 1e-3, "eps": 1e-6},
    }
    out["models"] = dict.fromkeys(unnamed, shop.teacher)
    if method == "dph_rl":
        out["method"] = "dph_rl(samples=4, enough=1)"
    if soup:
        out["reference"] = f"soup:{shop.student},{shop.teacher}"
    if "debate" in made.annotate:
        out["annotate"] = {"debate": {"of": [shop.teacher, shop.llama], "max_tokens": 4}}
    if made.curriculum.measures:
        out["evaluate"] = {"data": data, "every": 1}
    return out | settings


def stored(shop: Shop, cache: Path, folder: Path) -> dict[str, Any]:
    """Two steps on rollouts that were written and scored before: all that Lightning OPD reads."""
    out = values(shop, str(cache), folder, "lightning_opd", teacher=f"cached:{cache}")
    return {k: v for k, v in out.items() if k not in ("reward", "sampling")}


def on(count: int, cases: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What these runs come to in so many processes."""
    here = folder / str(count)
    here.mkdir(parents=True)
    mine = {n: {**v, "output": str(here / f"run{i}")} for i, (n, v) in enumerate(cases.items())}
    (here / "cases.json").write_text(json.dumps(mine))
    arguments = [str(here / "cases.json"), str(here / "found.pt")]
    if count == 1:
        main(*map(Path, arguments))
    else:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launch, f"--nproc-per-node={count}", "-m", "tests.end_to_end.ranks", *arguments]
        done = subprocess.run(command, **SEEN)  # type: ignore[call-overload]
        assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(here / "found.pt")


def differences(one: dict[str, Any], several: dict[str, Any]) -> dict[str, Any]:
    """The largest relative difference of each kind of number, and the metric that has it."""
    out: dict[str, Any] = {"worst": ""}
    for kind in ("gradients", "weights"):
        assert set(one[kind]) == set(several[kind])
        size = max((float(x.norm()) for x in one[kind].values()), default=0.0)
        apart = (float((x - several[kind][n]).norm()) for n, x in one[kind].items())
        out[kind] = max(apart, default=0.0) / max(size, 1e-300)
    assert len(one["metrics"]) == len(several["metrics"])
    out["metrics"] = 0.0
    for a, b in zip(one["metrics"], several["metrics"]):
        assert set(a) == set(b)
        for name, value in a.items():
            if not name.startswith(NOISE) and not math.isnan(value):
                apart_by = abs(value - b[name]) / max(1.0, abs(value))
                apart_by *= MOST["metrics"] / BESIDE if name.startswith("beside/") else 1
                if apart_by > out["metrics"]:
                    out["metrics"], out["worst"] = apart_by, name
    return out


def compare(
    cases: dict[str, dict[str, Any]], folder: Path, counts: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Several processes find what one finds; what each number of them found, with one first."""
    one, wrong = on(1, cases, folder), {}
    every = [one]
    for count in counts:
        every.append(several := on(count, cases, folder))
        for name in cases:
            assert one[name]["names"] == several[name]["names"], "the saved model's weights"
            found = differences(one[name], several[name])
            if any(found[kind] > most for kind, most in MOST.items()):
                wrong[name, count] = found
    assert wrong == {}
    return every


def test_two_processes_find_what_one_finds(shop: Shop, data: str, tmp_path: Path) -> None:
    """Sampled tokens, the whole vocabulary, a top k, groups over several updates, adapters."""
    several = {"learning_rate": 1e-3, "eps": 1e-6, "passes": 2, "minibatches": 2}
    asked = {
        "opd": {},
        "gkd": {"gradient_checkpointing": True},
        "topk_opd": {},
        "grpo": {"optim": several},
        "tip": {"lora": {"r": 4}},
    }
    cases = {m: values(shop, data, tmp_path, m, **more) for m, more in asked.items()}
    compare(cases, tmp_path, (2,))


@pytest.mark.ranks
@pytest.mark.parametrize("part", range(4))
def test_every_method_on_two_and_three(
    part: int, shop: Shop, data: str, cache: Path, tmp_path: Path
) -> None:
    cases = {
        m: stored(shop, cache, tmp_path)
        if m == "lightning_opd"
        else values(shop, data, tmp_path, m)
        for m in methods()[part::4]
    }
    compare(cases, tmp_path, (2, 3))


@pytest.mark.ranks
def test_models_of_every_kind(shop: Shop, data: str, tmp_path: Path) -> None:
    """Tied heads, another architecture, one rollout for all processes."""
    tied = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    one = {"prompts_per_step": 1, "sampling": {"num_generations": 1, "max_completion_length": 6}}
    cases = {
        "tied": values(shop, data, tmp_path, "opd", student=tied),
        "tied, adapters": values(shop, data, tmp_path, "opd", student=tied, lora={"r": 4}),
        "llama": values(shop, data, tmp_path, "opd", student=shop.llama),
        "one rollout": values(shop, data, tmp_path, "opd", **one),
        "one rollout, gkd": values(shop, data, tmp_path, "gkd", **one),
        "two rollouts, with noise": values(shop, data, tmp_path, "alp", prompts_per_step=1),
    }
    compare(cases, tmp_path, (2, 3))


EXPERTS = {"moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2}


@pytest.mark.ranks
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_student_in_few_bits(shop: Shop, data: str, tmp_path: Path, bits: str) -> None:
    """Whole on each process: its adapters learn from the tokens of all."""
    pytest.importorskip("bitsandbytes")
    few = {"lora": {"r": 4, "quantize": bits}, "dtype": "float32"}
    cases = {bits: values(shop, data, tmp_path, "gkd", **few)}
    one, two = (on(count, cases, tmp_path)[bits] for count in (1, 2))
    found = differences(one, two)
    assert all(found[kind] < 1e-5 for kind in ("gradients", "weights", "metrics")), found


@pytest.mark.ranks
def test_a_mixture_of_experts(shop: Shop, data: str, tmp_path: Path) -> None:
    """One rollout reaches few of the experts, and none of those of the processes without one."""
    noise = {"router_jitter_noise": 0.3}  # as dropout, it is off
    moe = save_tiny(tmp_path / "moe", "qwen3_moe", **EXPERTS, **noise)
    tied = save_tiny(tmp_path / "tied", "qwen3_moe", tie_word_embeddings=True, **EXPERTS)
    mixtral = save_tiny(tmp_path / "mixtral", "mixtral", num_local_experts=4, **noise)
    one = {"prompts_per_step": 1, "sampling": {"num_generations": 1, "max_completion_length": 6}}
    cases = {
        "plain": values(shop, data, tmp_path, "opd", student=moe),
        "tied": values(
            shop, data, tmp_path, "gkd", student=tied, teacher=moe, gradient_checkpointing=True
        ),
        "adapters": values(shop, data, tmp_path, "opd", student=moe, lora={"r": 4}),
        "mixtral": values(shop, data, tmp_path, "opd", student=mixtral),
        "one rollout": values(shop, data, tmp_path, "opd", student=moe, **one),
    }
    compare(cases, tmp_path, (2, 3))


@pytest.mark.ranks
def test_teachers_of_every_kind(shop: Shop, data: str, tmp_path: Path) -> None:
    """Spread over the processes, or whole on each: by route, mixed, averaged, behind a view, the
    student itself, with another tokenizer.
    """
    rows = [
        {**row, "teacher": ("default", "b")[i % 2]} for i, row in enumerate(read_lines(Path(data)))
    ]
    routed = write_rows(tmp_path / "routed.jsonl", rows)
    far = str(tmp_path / "far")
    sentencepiece(chat=True, bos=True).save_pretrained(far)
    size = max(sentencepiece(chat=True, bos=True).get_vocab().values()) + 1
    tiny_model("llama", size, seed=4).save_pretrained(far)
    two = {"default": shop.teacher, "b": shop.llama}
    tied = save_tiny(tmp_path / "tied", seed=3, tie_word_embeddings=True)
    ema = {"kind": "self", "weights": "ema", "rate": 0.1}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "by route": ("gkd", {"teacher": two, "data": routed}),
        "mixed": ("gkd", {"teacher": {"kind": "mixture", "of": {"a": shop.teacher, "b": tied}}}),
        "tied": ("topk_opd", {"teacher": tied}),
        "averaged": ("opd", {"teacher": f"soup:{shop.student},{shop.teacher}"}),
        "an average of the student": ("gkd", {"teacher": {**ema, "view": "solution"}}),
        "with another tokenizer": ("uld", {"teacher": far}),
        "with another tokenizer, merged": ("gold(hybrid=true, lmbda=1.0)", {"teacher": far}),
        "a reference below adapters": ("exopd", {"lora": {"r": 4}}),
        "whole": ("gkd", {"shard_teachers": False}),
        "that writes too": ("minillm(teacher_mix=0.2)", {}),
    }
    compare(
        {n: values(shop, data, tmp_path, m) | x for n, (m, x) in kinds.items()}, tmp_path, (2, 3)
    )


OWN = '''
"""Methods of one's own: what each process has of its tokens' top 4, in a mean and a quantile."""

from dataclasses import dataclass

from opdkit import Method
from opdkit.curricula import Mixed
from opdkit.objective import Exp, Likelihood, Logp, LogRatio, MeanOne, Objective, PolicyGradient
from opdkit.objective import Quantile, Signal, TokenLoss


@dataclass(frozen=True)
class Apart(Signal):
    def value(self, batch):
        own, other = (batch[model].at_top("student", 4) for model in ("student", "teacher"))
        return (own.exp() * (own - other)).sum(-1).abs()


@dataclass(frozen=True)
class Beside(Signal):
    def value(self, batch):
        apart = Apart().value(batch)
        return apart / apart[batch.mask].mean()


@dataclass(frozen=True)
class Picked(TokenLoss):
    def value(self, live):
        return -live.logp * live.pick(MeanOne(Apart()))


def weighed(by):
    return Objective(PolicyGradient(LogRatio("teacher", "student")) * by)


def exact():
    return weighed(MeanOne(Apart()) * (Apart() >= Quantile(Apart(), 0.5)))


def joined():
    return weighed(Beside())


def nothing():
    return weighed(Apart() > 1e9)


def picked():
    return Objective(Picked())


def given():
    loss = Likelihood().of("data") * Exp(Logp("sampler"))
    return Method(Objective(loss), curriculum=Mixed(0.0))
'''


@pytest.mark.ranks
def test_methods_of_ones_own(shop: Shop, data: str, tmp_path: Path) -> None:
    """Numbers of several tokens from facts at a top k; steps in which nothing is selected, or there
    is one rollout for all processes.
    """
    (tmp_path / "own.py").write_text(OWN)
    own = f"{tmp_path / 'own.py'}:"
    one = {"prompts_per_step": 1, "sampling": {"num_generations": 1, "max_completion_length": 6}}
    cases = {
        "exact": values(shop, data, tmp_path, own + "exact"),
        "one rollout": values(shop, data, tmp_path, own + "exact", **one),
        "nothing": values(shop, data, tmp_path, own + "nothing"),
        "what nobody drew": values(shop, data, tmp_path, own + "given", **one),
        "in a loss": values(shop, data, tmp_path, own + "picked", **one),
        "a copy": values(shop, data, tmp_path, f"{ROOT / 'examples' / 'own_ema.py'}:steady"),
    }
    compare(cases, tmp_path, (2, 3))
    with pytest.raises(AssertionError, match="Make it in two signals"):
        on(2, {"joined": values(shop, data, tmp_path, own + "joined")}, tmp_path / "refused")


@pytest.mark.ranks
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_saved_experts_are_those_of_one_process(
    shop: Shop, tmp_path: Path, tied: bool, lora: bool
) -> None:
    """The same names and numbers, which plain from_pretrained loads."""
    student = save_tiny(tmp_path / "student", "qwen3_moe", tie_word_embeddings=tied, **EXPERTS)
    saved = []
    for count in (1, 2):
        out = tmp_path / str(count)
        several = ["--nproc=2"] if count == 2 else []
        adapters = ["lora.r=4"] if lora else []
        assert shop.train(out, *several, "dtype=float64", *adapters, student=student) == 0
        saved.append(load_file(out / "model" / "model.safetensors"))
        model, report = AutoModelForCausalLM.from_pretrained(
            out / "model", dtype=torch.float64, output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    one, two = saved
    assert set(one) == set(two)
    for name, weight in one.items():
        assert torch.allclose(two[name], weight, 0, 1e-6), name
