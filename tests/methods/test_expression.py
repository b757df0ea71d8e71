"""Methods multiplied by weights and added: what comes out, how it is spelled, and what is refused,
with the reason.
"""

from __future__ import annotations

import json

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.cli import main
from opdkit.curricula import Curriculum, Mixed, PassRates, Plain, TeacherPrefix, together
from opdkit.curricula.prefix import GuidedWriter
from opdkit.methods import expression
from opdkit.methods.explain import explain
from opdkit.methods.method import load, weight_of
from opdkit.objective import algebra, credits
from opdkit.objective.formula import Const
from opdkit.objective.needs import per_rollout
from opdkit.objective.signals import Draw, Entropy, Exp, LogRatio, Where
from opdkit.run.settings import MethodSpec, load_run, make_run
from opdkit.testing import check, evaluate, fabricate
from opdkit.testing.check import RULES
from opdkit.types import Prompt, Rollout, Sampling
from tests.curricula.context import context
from tests.methods.toy import close, logits, tokens

BASES = ("opd", "gkd", "tropd", "exopd", "vopd")
WEIGHTS = ("iw_opd", "tip", "paced", "drift_gating", "position_opd", "scope")


# -------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("base", BASES)
def test_every_pair_passes_check_and_is_the_base_times_the_weight(base, weight):
    made, alone = load(f"{base} * {weight}"), load(base)
    assert len(check(made).passed) == len(RULES)
    batch = fabricate(made.objective).batch(made.objective)
    factor = weight_of(weight)(batch).to(batch.dtype)
    if not per_rollout(weight_of(weight)):  # it says nothing of the tokens of a teacher's prefix
        factor = torch.where(batch.mask, factor, 1.0)
    for mine, was in zip(made.objective.plan(batch).parts, alone.objective.plan(batch).parts):
        assert (
            torch.allclose(mine.weight, was.weight * factor, rtol=1e-12)
            and mine.term.loss == was.term.loss
        )
        assert mine.term.denominator == was.term.denominator and torch.equal(
            mine.denominator, was.denominator
        )


@pytest.mark.parametrize("base", WEIGHTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_weights_multiply_each_other_but_not_themselves(base, weight):
    if base == weight:
        with pytest.raises(UserError, match="already carries the weight"):
            load(f"{base} * {weight}")
    else:
        made = load(f"{base} * {weight}")
        assert made.objective == load(base).objective * weight_of(weight)


def test_the_weights_of_opds_own_variants_give_these_variants():
    assert load("opd * iw_opd(gamma=0.7)").objective == load("iw_opd", gamma=0.7).objective
    assert (
        load("opd * position_opd(part=last)").objective
        == load("position_opd", part="last").objective
    )
    for base in ("tropd", "scope", "gkd(beta=0.1)", "iw_opd"):
        assert (load(base) * load("drift_gating")).objective == load(
            "drift_gating", base=load(base)
        ).objective


def test_iw_weights_on_a_divergence():
    """Gaps (.2, -.3, .5), gamma .5: weights (1.5, 1.4, 1.25), as in IW-OPD's own example; the mean
    is over all three tokens.
    """
    student = (-1.0, -0.9, -1.2)
    s = logits(*((torch.tensor(x).exp().item(), 1 - torch.tensor(x).exp().item()) for x in student))
    t = logits(
        *(
            (torch.tensor(x + d).exp().item(), 1 - torch.tensor(x + d).exp().item())
            for x, d in zip(student, (0.2, -0.3, 0.5))
        )
    )
    made, alone = (
        evaluate(m, s, tokens(0, 0, 0), models={"teacher": t})
        for m in ("gkd(beta=1) * iw_opd", "gkd(beta=1)")
    )
    assert close(made.terms[0].weight[0], (1.5, 1.4, 1.25)) and made.terms[0].denominator == 3
    assert torch.allclose(
        made.grad,
        alone.grad * torch.tensor([1.5, 1.4, 1.25], dtype=torch.float64)[:, None],
        atol=1e-7,
    )


def test_scopes_weight_is_each_rollouts_share_in_its_own_set():
    case = fabricate(load("gkd * scope").objective)
    out = case.run(load("gkd * scope").objective)
    scope = case.run(load("scope").objective)
    assert torch.equal(out.terms[0].weight, scope.terms[0].weight + scope.terms[1].weight)
    rows = out.terms[0].weight.amax(1)
    right = torch.tensor([True, False, True, False, False, True])
    for group in (slice(0, 3), slice(3, 6)):  # mean 1 inside each prompt's right and wrong answers
        for kind in (right[group], ~right[group]):
            assert rows[group][kind].mean().item() == pytest.approx(1)


def test_the_denominator_stays_the_bases():
    """Tip alone is a mean over the kept tokens; as a weight it leaves the mean over all."""
    case = fabricate(load("tip").objective)
    own, over_all = (
        case.run(load("tip").objective),
        case.run(load("opd(support=full) * tip").objective),
    )
    assert over_all.terms[0].denominator == case.mask.sum() > own.terms[0].denominator
    ratio = own.terms[0].denominator / over_all.terms[0].denominator
    assert torch.allclose(over_all.grad, own.grad * ratio, rtol=1e-12)


def test_what_a_methods_weight_is():
    assert weight_of("paced", two_stage=True) == weight_of("paced")  # the factor of both stages
    # of every term, whatever the base
    assert weight_of("drift_gating", base="eopd") == weight_of("drift_gating")
    assert weight_of(load("iw_opd") * load("paced")) == weight_of("iw_opd") * weight_of("paced")


# --------------------------------------------------------------------------------- sums and numbers


def test_a_sum_has_the_sum_of_gradients():
    case = fabricate(load("opd + gkd").objective)
    opd, gkd, both = (case.run(load(m).objective).grad for m in ("opd", "gkd", "0.5 * opd + gkd"))
    assert torch.allclose(both, 0.5 * opd + gkd, rtol=1e-12)
    assert load("0.5 * (opd + gkd)") == 0.5 * (load("opd") + load("gkd"))


def test_a_weight_on_a_sum_is_on_both_terms():
    made = load("(opd + gkd) * iw_opd")
    assert [term.weight for term in made.objective.terms] == [weight_of("iw_opd")] * 2


# ----------------------------------------------------------------------------------------- spelling


@pytest.mark.parametrize(
    "text",
    [
        "tropd(k=32) * iw_opd(gamma=1) * paced(a=2)",
        "0.5 * opd + gkd(beta=0.1)",
        "(opd + gkd) * (iw_opd * paced)",
        "2 * (opd * iw_opd)",
        "drift_gating(base='tropd * iw_opd', block=8)",
        "opd(clip=(0.2, 0.28), dual_clip=3) * tip",
        "opd(support='student', k=8) * iw_opd",
    ],
)
def test_a_composed_method_is_saved_by_its_expression(text):
    made = load(text)
    assert load(made.name, **dict(made.arguments)) == made and (made.name == text or made.arguments)
    assert made.summary and str(made)


def test_spellings_that_mean_the_same():
    made = load("tropd(k=32)*iw_opd( gamma = 1 )")
    assert made.name == "tropd(k=32) * iw_opd(gamma=1)"
    assert load("tropd", k=32) * load("iw_opd", gamma=1) == made
    drawn = Where("student", weight_of("iw_opd", gamma=1), Const(1))
    assert load("tropd", k=32).objective * drawn == made.objective
    assert MethodSpec("tropd", {"k": 32}, (MethodSpec("iw_opd", {"gamma": 1}),)).load() == made
    assert load("opd(support=student, k=4) * tip(least=1)") == load(
        "opd(support='student', k=4) * tip(least=1)"
    )


def test_a_signal_of_ones_own_multiplies_a_method():
    sure = Exp(-Entropy("teacher"))
    made = load("tropd") * sure
    assert (
        made.name == "own"
        and made.objective == load("tropd").objective * Where("student", sure, Const(1))
        and made.curriculum == TeacherPrefix()
    )
    assert "4 times" not in made.doc and len(check(made).passed) == len(RULES)


def test_files_of_ones_own_in_an_expression(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from opdkit.objective import Entropy, LogRatio, PolicyGradient\ndef sure(t=1.0):\n    "
        "return PolicyGradient(LogRatio('teacher', 'student')) * Entropy('teacher') * t\n"
    )
    made = load("./mine.py:sure(t=2.0) * iw_opd")
    assert made.name == "./mine.py:sure(t=2.0) * iw_opd" and load(made.name) == made
    assert str(weight_of("mine.py:sure")) == "Entropy(teacher) * 1" and load(
        "gkd * mine.py:sure"
    ).curriculum == Mixed(1.0)
    assert expression.base_of(made.name) == "./mine.py:sure(t=2.0)"
    assert len(check(made).passed) == len(RULES)


def test_in_a_run(tmp_path):
    base = {"student": "s", "teacher": "t", "data": "d"}
    run = make_run(
        base
        | {"method": {"name": "tropd", "k": 32, "times": ["iw_opd", {"name": "paced", "a": 2}]}}
    )
    assert (
        run.method_spec.load().name == "tropd(k=32) * iw_opd * paced(a=2)" == str(run.method_spec)
    )
    (tmp_path / "run.yaml").write_text(run.yaml())
    assert load_run(tmp_path / "run.yaml") == run
    flags = ["method=tropd", f"method.times={json.dumps(['iw_opd', 'paced(a=2)'])}", "method.k=32"]
    assert make_run(base, flags).method_spec.load() == run.method_spec.load()
    assert (
        make_run(base, ["method=tropd(k=32) * iw_opd * paced(a=2)"]).method_spec.load()
        == run.method_spec.load()
    )
    assert (
        make_run(base | {"method": {"name": "opd", "times": "iw_opd"}}).method_spec.load().name
        == "opd * iw_opd"
    )


def test_on_the_command_line(capsys):
    assert main(["check", "gkd * paced"]) == 0
    assert "pass  micro-batches" in capsys.readouterr().out
    assert main(["explain", "tropd * tip"]) == 0
    shown = capsys.readouterr().out
    assert (
        "every term times the weight of tip" in shown
        and "new beside those of tropd alone: student, without gradient" in shown
    )
    assert main(["check", "gkd * opd"]) == 2
    assert "opd has no weight" in capsys.readouterr().err
    command = [
        "train",
        "--student",
        "s",
        "--teacher",
        "t",
        "--data",
        "d",
        "--method",
        "opd",
        "--times",
        "opd",
        "--times",
        "iw_opd",
    ]
    assert main([*command, "--dry-run"]) == 2
    assert "opd has no weight" in capsys.readouterr().err


def test_explain_says_when_a_weight_costs_no_forward_pass():
    assert "new beside those of tropd(k=8) alone: none" in explain("tropd(k=8) * iw_opd")
    assert "new beside" not in explain("tropd") and "new beside" not in explain("opd + gkd")


# ------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("gkd * opd", "opd has no weight"),
        ("opd * gkd", "gkd has no weight"),
        ("opd * (opd + iw_opd)", "each in its own way, which chooses between losses"),
        ("opd * tropd", "chooses between losses"),
        ("opd * cr_opd", "chooses between losses"),
        ("opd * grpo(rollout_cap=5)", "not multiplied by any signal"),
        ("opd * iw_opd(clip=(0.2, 0.2))", "which belong to its own loss"),
        ("opd * iw_opd(rollout_cap=5)", "which belong to its own loss"),
        ("gkd * scope(rollout_cap=5)", "which belong to its own loss"),
        ("iw_opd * paced * iw_opd", "already carries the weight"),
        ("grpo(loss=gspo) * iw_opd", "no value per token"),
        ("gkd(lmbda=0.5) * paced", "student now solves"),
        ("kl_mixing(prefix=teacher) * paced", "student now solves"),
        ("distillm * paced", "student now solves"),
        ("tropd + gkd(lmbda=0.5)", "only one can decide"),
        ("opd * drift_gating(base=tropd)", "decides who writes"),
        ("minillm(teacher_mix=0.2) + opd", "only one can hold. Run one of them"),
        ("dph_rl + salsa", "only one can hold. Run one of them"),
        ("salsa + grpo(reference_kl=0.1)", "only one can hold. Run one of them"),
        ("0 * opd", "positive number"),
        ("opd + 1", "number is added"),
        ("2 * 3", "is a number"),
        ("tropd(32) * iw_opd", "by name"),
        ("tropd(k=32", "neither the name"),
        ("tropd(k=2 + opd) * iw_opd", "not a number"),
        ("tropd * iw_opd - opd", "joined by"),
        ("(lambda: 1) * opd", "joined by"),
        ("__import__(name='os') * opd", "unknown method"),
        ("opd.objective * iw_opd", "joined by"),
        ("tropd * iw_odp", "did you mean 'iw_opd'"),
        ("tropd(kk=3) * iw_opd", "no argument 'kk'"),
        ("(" * 400 + "opd" + ")" * 400, "neither the name"),
    ],
)
def test_refused_with_a_reason(text, reason):
    with pytest.raises(UserError, match=reason):
        load(text)


def test_arguments_belong_inside_an_expression():
    with pytest.raises(UserError, match="inside the expression"):
        load("tropd * iw_opd", k=3)


def test_a_weight_per_rollout_may_weigh_a_loss_over_rollouts():
    for weight in ("paced", "scope"):
        assert len(check(f"grpo(loss=gspo) * {weight}").passed) == len(RULES)


IMPORTS = (
    "from opdkit.methods.minillm import Whitened\nfrom opdkit.objective import PolicyGradient\n"
    "from opdkit.objective import Advantage, Entropy, Exp, Floor, LogRatio, MeanOne, ToGo\n"
    "r = LogRatio('teacher', 'student')\nd = LogRatio('student', 'teacher')\n"
)


@pytest.mark.parametrize(
    ("credit", "reason"),
    [
        ("-(Exp(r) - r - 1)", "k3"),
        ("Advantage() - 0.1 * (Exp(-d) + d - 1)", "k3"),
        ("Advantage() + Entropy('teacher') * (1 + r - Exp(r))", "k3"),
        ("ToGo(Floor(r - Exp(r), -5))", "k3"),
        ("Advantage() - r * r * 0.5", "k2"),
        ("-abs(d)", r"\|log"),
        ("Whitened(r)", "standardises"),
        ("Advantage() + Whitened(Floor(r, -5))", "standardises"),
        ("MeanOne(2 * r)", "standardises"),
        ("r + Exp(r)", ""),  # reverse and forward KL: both directions
        ("r * MeanOne(Exp(-abs(r)))", ""),  # weights may be normalised, and depend on |r|
        ("Advantage() + r * (abs(r) < 10)", ""),
        ("ToGo(Floor(r, -5))", ""),
    ],
)
def test_credits_that_are_wrong_are_refused_in_ones_own_method(tmp_path, credit, reason):
    (tmp_path / "mine.py").write_text(
        f"{IMPORTS}def method():\n    return PolicyGradient({credit})\n"
    )
    address = f"{tmp_path}/mine.py:method"
    if reason:
        for use in (load, lambda a: load(f"{a} * iw_opd")):
            with pytest.raises(UserError, match=reason):
                use(address)
        assert main(["check", address]) == 2
    else:
        assert len(check(load(address)).passed) == len(RULES)


def test_minillm_whitens_by_its_own_definition(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from opdkit import load\ndef method():\n    return 0.123456789 * load('minillm')\n"
    )
    assert load(f"{tmp_path}/mine.py:method").objective == load("0.123456789 * minillm").objective
    credit = load("minillm").objective.terms[0].loss.credit
    assert credits.standardised(credit) and len(check("minillm * paced").passed) == len(RULES)


# ---------------------------------------------------------------------------------------- curricula


def test_curricula_of_both_sides():
    def of(text):
        return load(text).curriculum

    assert of("opd * paced") == PassRates() == of("gkd * paced") and of("gkd * iw_opd") == Mixed(
        1.0
    )
    assert (
        of("tropd * paced")
        == together.Together((TeacherPrefix(), PassRates()))
        == of("tropd * paced * iw_opd")
    )
    assert (
        of("tropd + opd") == TeacherPrefix() == of("opd + tropd")
        and of("tropd + tropd(k=8)") == TeacherPrefix()
    )
    assert of("opd + gkd") == Plain()


def test_together_one_writes_and_the_other_remembers():
    both = load("tropd * paced").curriculum
    written = both.writer.write(context([Prompt("q", [1])], sampling=Sampling(num_generations=2)))
    assert [(r.group, r.tokens) for r in written] == [
        ("q", [0]),
        ("q", [1]),
        ("q:guided", [5, 6, 7, 8, 0]),
    ]
    seen = [Rollout(str(i), [1], [2], [True], [0.0], [0.0], "q", correct=i < 3) for i in range(4)]
    assert (
        both.observe(seen, {"kept": 1})["pass_rate"] == {"q": 0.75}
        and both.observe(seen, {"kept": 1})["kept"] == 1
    )
    assert both.writer == GuidedWriter(1) and not both.measures and both.needs_own


def test_together_is_a_whole_curriculum():
    asked = {name for name in (*vars(Curriculum), *Curriculum.__annotations__) if name[0] != "_"}
    assert {"writer", "needs_own", "recalled", "beside", "before"} <= asked
    assert asked <= set(vars(together.Together))


def test_a_draw_is_the_same_with_and_without_a_weight():
    trusted = Draw(Exp(LogRatio("teacher", "student")))
    case = fabricate(load("tropd * iw_opd").objective)
    made, alone = (
        case.run(load(m).objective).terms[0].weight != 0 for m in ("tropd * iw_opd", "tropd")
    )
    assert torch.equal(made, alone) and trusted in algebra.factors(
        load("tropd * iw_opd").objective.terms[0].weight
    )
    assert algebra.factors(Const(2) * trusted) == (trusted,)
