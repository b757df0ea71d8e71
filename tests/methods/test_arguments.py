"""Every argument of every method is described, and the ratio layer's are every policy gradient's
for nothing.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections import Counter
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import opdkit
from opdkit.base.errors import UserError
from opdkit.cli import main
from opdkit.methods import METHODS
from opdkit.methods.arguments import (
    Argument,
    described,
    itself,
    not_negative,
    one_of,
    positive,
    shares,
)
from opdkit.methods.explain import explain
from opdkit.methods.method import function_of, load, spelled
from opdkit.methods.pages import render
from opdkit.objective import (
    Clipped,
    Likelihood,
    LogRatio,
    Mark,
    Objective,
    PolicyGradient,
    credit_of,
)
from opdkit.objective.ratio_layer import SETTINGS, apply_layer
from opdkit.run.settings import MethodSpec, make_run
from opdkit.testing import check, fabricate
from opdkit.testing.check import RULES

FOLDER = Path(opdkit.__file__).parent / "methods"
FILES = sorted(
    {FOLDER / f"{home.partition(':')[0].split('.')[-1]}.py" for home in METHODS.values()}
)
WITHOUT = {"gkd", "topk_opd", "kl_mixing", "tip", "paced", "distillm", "uld", "gold"}
WITHOUT |= {"sft", "dagger", "opsd", "sdft", "sdpo", "selfci"}
WITHOUT |= {"mad_opd", "opad", "f_dpo", "sinkd", "pld", "bd_kd", "eksft"}
# those with a policy gradient without a ratio
WITHOUT |= {"vla_opd", "hypo", "f_dpg"}
WITH = sorted(set(METHODS) - WITHOUT)

# -------------------------------------------------------------------------------------- described


@pytest.mark.parametrize("name", METHODS)
def test_every_argument_is_described_and_no_other(name):
    function = function_of(name)
    _, found = described(inspect.getdoc(function))
    assert list(found) == list(inspect.signature(function).parameters)
    for argument in found.values():
        assert len(argument.meaning.split()) >= 4 and argument.meaning.endswith(".")
        assert argument.source.endswith(".")
    assert "Arguments" not in described(load(name).doc)[0]


def test_the_layer_describes_its_own():
    _, found = described(inspect.getdoc(apply_layer))
    assert tuple(found) == SETTINGS and all(a.meaning and a.source for a in found.values())


def test_what_a_section_says():
    doc = """Idea: words.

    More words.

    Arguments:
        gamma: a weight: at least 0, of
            any size. Default: the paper's.
        on: whether it is on.

    Behind it.
    """
    prose, found = described(inspect.cleandoc(doc))
    assert prose == "Idea: words.\n\nMore words.\n\nBehind it."
    assert found == {
        "gamma": Argument("a weight: at least 0, of any size.", "the paper's."),
        "on": Argument("whether it is on."),
    }
    assert described("Arguments: none.") == ("Arguments: none.", {}) and described("") == ("", {})


def test_pages_and_explain_show_them():
    page, shown = render(load("iw_opd"), ""), explain("iw_opd", gamma=1)
    assert "| `gamma` | `0.5` | by how much the first token of a rollout counts more" in page
    assert (
        page.index("| `mean_one` |") < page.index("every policy gradient") < page.index("| `clip`")
    )
    assert "gamma = 1\n" in shown and "clip = None\n" in shown and "Arguments:" not in shown
    assert "counts more than its last" in shown and "PPO's range of the ratio" in shown
    assert "every policy gradient" not in render(load("gkd"), "") + explain("gkd")


def test_a_method_without_arguments():
    assert "## Arguments\n\nNone.\n" in render(load("sft"), "") and "arguments\n" not in explain(
        "sft"
    )


def test_a_wrong_argument_of_a_method_without_any():
    with pytest.raises(UserError, match="method 'sft' has no argument 'k'; known: none"):
        load("sft", k=3)


def test_pages_and_explain_show_the_models_that_a_method_brings():
    said = "teacher: {kind: self, weights: ema, rate: 0.001, first_copy: true, view: solution}"
    made = load("opsd", teacher="ema")
    assert f"Unless the run says otherwise, `{said}`." in render(made, "")
    assert f"unless the run says otherwise, {said}\n" in explain(made) + "\n"
    assert explain(made).count("kind: self") == 1 and "'kind'" not in explain(made)
    noted = "noted on its rollouts, debate: {kind: debate, rounds: 2, of: [teacher_1, teacher_2]}"
    assert noted in explain("mad_opd").splitlines()


def test_one_of():
    one_of(mode=("mean", ("mean", "minmax")))
    with pytest.raises(ValueError, match="mode='median' must be one of mean, minmax"):
        one_of(mode=("median", {"mean": 1, "minmax": 2}))


def test_shares_and_positive_numbers():
    shares(a=(0.0, ""), b=(1.0, ""))
    positive(a=(1e-9, ""), b=(float("inf"), ""))
    for value in (-1e-9, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"mix={value} must lie in \[0, 1\]: it is a part"):
            shares(mix=(value, "it is a part"))
    not_negative(a=(0.0, ""), b=(float("inf"), ""))
    for value in (-1e-9, float("nan")):
        with pytest.raises(ValueError, match=f"a={value} must be at least 0: it is a weight"):
            not_negative(a=(value, "it is a weight"))
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"cap={value} must be positive: it is a bound"):
            positive(cap=(value, "it is a bound"))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_what_is_no_number_is_no_argument(name):
    """nan is nowhere one, infinity not where a whole number or a choice is asked for."""
    for argument, hint in get_type_hints(function_of(name)).items():
        kinds = set(get_args(hint)) or {hint}
        if argument != "return" and kinds & {int, float}:
            with pytest.raises(UserError, match=f"method '{name}': {argument}"):
                load(name, **{argument: math.nan})
        if kinds <= {int, bool, str, type(None)}:
            with pytest.raises(UserError):
                load(name, **{argument: math.inf})


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_refused_number_is_called_as_it_was_given(name):
    """Also where it goes on to a part that has another name for it, and where it came as text; no
    error is one of Python's own.
    """
    for argument, value in load(name).arguments:
        if isinstance(value, str) and value in METHODS:
            continue  # another method
        for bad in (-1, math.inf, "nan", "x", [], [1, 2, 3], {"a": 1}):
            try:
                load(name, **{argument: bad})
            except UserError as error:
                said = str(error).partition(": ")[2]
                # alp's c is the layer's dual_clip, which settings call so too
                assert re.search(rf"\b({argument}|dual_clip)\b", said), said
                assert " object " not in said and "not supported" not in said, said
            else:
                assert bad != "nan" or isinstance(value, (str, tuple)), argument


def test_no_number_in_the_ratio_layer():
    for argument in ("rollout_cap", "divergence_mask", "smooth", "clip"):
        with pytest.raises(UserError, match=f"method 'opd': {argument}=nan is no number"):
            load("opd", **{argument: math.nan})
    with pytest.raises(ValueError, match="must be greater than 1"):
        Clipped(LogRatio("teacher", "student"), 0.2, 0.2, math.nan)


def test_the_student_as_its_own_teacher():
    assert itself("hint", "fixed", rate=0.5) == {"kind": "self", "weights": "fixed", "view": "hint"}
    assert itself("hint", "ema", rate=0.5)["rate"] == 0.5
    with pytest.raises(ValueError, match="teacher='sync' must be one of fixed, ema, live"):
        itself("hint", "sync")


# ---------------------------------------------------------------------------------------- the layer


def test_methods_do_not_say_the_layer():
    """No argument, name or keyword of a method's file is one of the layer's, and no two files
    have their words.
    """
    words = Counter()
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        words.update(set(re.findall(r"\b(?:dual_clip|rollout_cap)\b", text)))
        nodes = list(ast.walk(ast.parse(text)))
        said = {x for n in nodes for x in (getattr(n, "arg", None), getattr(n, "id", None))}
        assert not said & set(SETTINGS), file.name
    assert all(times == 1 for times in words.values())


@pytest.mark.parametrize("name", WITH)
def test_every_policy_gradient_takes_them(name):
    plain, bound = load(name), load(name, clip=(0.1, 0.3), dual_clip=3.0, rollout_cap=1.5)
    assert set(SETTINGS) <= dict(plain.arguments).keys()
    assert dict(bound.arguments) == dict(plain.arguments) | {
        "clip": (0.1, 0.3),
        "dual_clip": 3.0,
        "rollout_cap": 1.5,
    }
    off = load(name, **dict.fromkeys(SETTINGS))
    for made in (plain, bound, off):
        assert load(made.name, **dict(made.arguments)) == made
        assert load(spelled(made)).objective == made.objective
    assert not any(isinstance(term.loss, Clipped) for term in off.objective.terms)
    own = {k: v for k, v in bound.arguments if k in SETTINGS}
    assert load(name, **own).objective == bound.objective


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_where_there_is_no_policy_gradient_they_are_refused(name):
    assert not set(SETTINGS) & dict(load(name).arguments).keys()
    for given in ({"clip": (0.2, 0.2)}, {"dual_clip": 3.0}, {"divergence_mask": 0.1}):
        with pytest.raises(UserError, match=f"method '{name}': clip, .* Leave them out"):
            load(name, **given)
    assert load(name, clip=None) == load(name)  # off: it is


def test_a_form_that_is_a_divergence_refuses_them_too():
    words = "belong to the sampled policy gradient, not to a backpropagated divergence"
    for given in ({"clip": (0.2, 0.2)}, {"rollout_cap": 5}):
        with pytest.raises(UserError, match=words):
            load("opd", support="full", **given)
    with pytest.raises(UserError, match="no argument 'clp'; did you mean 'clip'"):
        load("opd", clp=0.2)


@pytest.mark.parametrize("name", ["grpo", "kdrl", "rlad", "minillm", "lightning_opd"])
def test_a_methods_own_clipping_stays_until_another_is_given(name):
    assert dict(load(name).arguments)["clip"] == (0.2, 0.2)
    assert load(name, clip=(0.2, 0.2)) == load(name) == load(name, clip=0.2)
    assert spelled(load(name)) == name and spelled(load(name, clip=None)) == f"{name}(clip=None)"


def test_spellings():
    made = load("opd", clip=0.2)
    assert made == load("opd", clip=(0.2, 0.2)) == load("opd", clip=[0.2, 0.2])
    assert made.objective == load("opd(clip=0.2)").objective
    assert dict(made.arguments)["clip"] == (0.2, 0.2)
    run = {"student": "s", "teacher": "t", "data": "d"}
    for flags in (["method=opd(clip=0.2)"], ["method=opd", "method.clip=0.2"]):
        assert make_run(run, flags).method_spec.load().objective == made.objective
    of_yaml = make_run(run | {"method": {"name": "opd", "clip": 0.2, "times": ["iw_opd"]}})
    assert of_yaml.method_spec.load().name == "opd(clip=(0.2, 0.2)) * iw_opd"
    assert MethodSpec("opd", {"clip": [0.2, 0.2]}).load() == made
    both = load("opd(clip=0.2) + 0.5 * grpo(rollout_cap=2)")
    assert load(both.name) == both and "clip=(0.2, 0.2)" in both.name


def test_tokens_of_a_teachers_prefix_are_no_policy_gradient():
    """No sampler drew them, so there is no ratio to bound; what a mark selects is for the formula
    to say.
    """
    losses = [term.loss for term in load("tropd", prefix="credit", clip=(0.1, 0.2)).objective.terms]
    assert isinstance(losses[0], Clipped) and credit_of(losses[-1]) is None
    batch = fabricate(Objective(Likelihood() * Mark("guided"))).batch(Objective(Likelihood()))
    asked = Objective(PolicyGradient(LogRatio("teacher", "student")) * Mark("guided"))
    assert (
        batch.mark("guided").any()
        and not asked.terms[0].loss.defined(batch)[batch.mark("guided")].any()
    )


OWN = """
from opdkit.objective import Clipped, LogRatio, Objective, PolicyGradient
R = LogRatio("teacher", "student")
def plain(size: float = 1.0):
    '''Mine: OPD, larger.'''
    return PolicyGradient(R) * size
def mine(clip: float = 3.0, size=2):
    '''Mine: clip is what it is to me.'''
    return Objective(PolicyGradient(R) * clip * size)
def needs(size):
    return PolicyGradient(R) * size
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return str(path)


def test_a_method_of_ones_own_gets_them_for_nothing(own):
    made = load(f"{own}:plain", clip=[0.1, 0.2], dual_clip=3, size=2)
    assert made.objective == Objective(Clipped(LogRatio("teacher", "student"), 0.1, 0.2, 3) * 2)
    layer = dict.fromkeys(SETTINGS) | {"clip": (0.1, 0.2), "dual_clip": 3}
    assert made.arguments == (("size", 2), *layer.items())
    assert load(f"{own}:plain(clip=(0.1, 0.2), dual_clip=3, size=2)").objective == made.objective
    assert len(check(made).passed) == len(RULES)


def test_an_argument_of_the_functions_own_stays_its_own(own):
    made = load(f"{own}:mine", clip=5.0)
    layer = {name: None for name in SETTINGS if name != "clip"}
    assert made.arguments == (("clip", 5.0), ("size", 2), *layer.items())
    assert str(made) == "PolicyGradient(log(teacher/student)) * 5 * 2"
    assert "cap=2" in str(load(f"{own}:mine", clip=5.0, rollout_cap=2.0))
    with pytest.raises(UserError, match="give clip="):
        load(f"{own}:mine", dual_clip=3.0)
    assert load(f"{own}:needs", size=2, rollout_cap=2.0).arguments[0] == ("size", 2)
    with pytest.raises(UserError, match="no argument 'sise'; did you mean 'size'"):
        load(f"{own}:needs", sise=2)


def test_on_the_command_line(capsys):
    assert main(["check", "vopd", "k=8", "clip=0.2"]) == 0
    assert "vopd: Clipped(" in capsys.readouterr().out
    assert main(["explain", "vopd", "clip=0.2", "rollout_cap=2"]) == 0
    shown = capsys.readouterr().out
    assert "clip = (0.2, 0.2)" in shown and "rollout_cap = 2" in shown and "Clipped(" in shown
