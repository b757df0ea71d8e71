"""Methods by name and from one's own file: found, refused with the nearest name, compared, printed
and saved.
"""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

import opdkit
from opdkit.base.errors import UserError
from opdkit.curricula import TeacherPrefix
from opdkit.methods.method import Method, as_method, function_of, load, methods
from opdkit.objective.copies import Ema
from opdkit.objective.grammar import Objective
from opdkit.objective.losses import Likelihood, PolicyGradient
from opdkit.objective.signals import LogRatio
from opdkit.testing import check, evaluate
from tests.methods.toy import P_S, P_T, close, logits, tokens

OWN = '''
"""My method."""
from dataclasses import dataclass

import torch

from opdkit import Method
from opdkit.objective import LogRatio, Objective, PolicyGradient, Signal


@dataclass(frozen=True)
class Bounded(Signal):
    """tanh of a signal."""
    of: Signal
    size: float = 1.0

    def value(self, batch):
        return self.size * torch.tanh(self.of(batch) / self.size)


def bounded(size: float = 2.0):
    """Credits of at most `size` nats.

    More text.
    """
    return Objective(PolicyGradient(Bounded(LogRatio("teacher", "student"), size)))


def as_term():
    return PolicyGradient(LogRatio("teacher", "student")) * 0.5


def wrong():
    return 3


def broken():
    return Bounded(1, 2, 3)


NUMBER = 7
'''


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return str(path)


def test_the_table_and_the_package_agree():
    assert opdkit.methods() == methods() and set(methods()) >= {
        "opd",
        "gkd",
        "gopd",
        "exopd",
        "tropd",
        "iw_opd",
        "scope",
        "vopd",
    }
    assert opdkit.load("opd") == load("opd")
    for name in methods():
        made = load(name)
        assert made.name == name and made.summary and str(made)
        assert {*inspect.signature(function_of(name)).parameters} <= dict(made.arguments).keys()


def test_a_method_in_ones_own_file(own):
    made = load(f"{own}:bounded", size=0.5)
    assert made.summary == "Credits of at most `size` nats." and made.arguments[0] == ("size", 0.5)
    out = evaluate(made, logits(P_S), tokens(0), models={"teacher": logits(P_T)})
    assert close(out.terms[0].credit, [[-0.5 * torch.tanh(torch.tensor(0.916291 / 0.5)).item()]])
    assert (
        not check(f"{own}:bounded").failed
        and not check(made).failed
        and not check(f"{own}:as_term").failed
    )


def test_it_is_a_value_like_the_others(own):
    a, b = load(f"{own}:bounded"), load(f"{own}:bounded")
    assert a == b and hash(a) == hash(b) and a != load(f"{own}:bounded", size=1.0)
    assert pickle.loads(pickle.dumps(a)) == a and copy.deepcopy(a) == a
    assert str(a) == "PolicyGradient(Bounded(log(teacher/student), size=2.0))"


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("opdd", {}, "unknown method 'opdd'; did you mean 'opd'"),
        ("iw-opd", {}, "did you mean 'iw_opd'"),
        ("zzzz", {}, "known: .*opd.*file.py:function"),
        (
            "opd",
            {"discont": 0.5},
            "method 'opd' has no argument 'discont'; did you mean 'discount'",
        ),
        ("gkd", {"lambda": 0.5}, "has no argument 'lambda'; did you mean 'lmbda'"),
        (
            "tropd",
            {"outliers": "drop"},
            "method 'tropd': outliers='drop' must be one of forward_kl, mask, clip",
        ),
        ("OWN:bounde", {}, "defines no 'bounde'; did you mean 'bounded'"),
        ("OWN:bounded", {"sise": 1}, "has no argument 'sise'; did you mean 'size'"),
        ("OWN:wrong", {}, r"returned 3 \(int\), which"),
        ("OWN:NUMBER", {}, "is not a function"),
        ("OWN:broken", {}, "positional arguments"),
        ("nowhere.py:bounded", {}, "nowhere.py, which is not there"),
    ],
)
def test_mistakes_are_explained(own, name, arguments, words):
    with pytest.raises(UserError, match=words):
        load(name.replace("OWN", own), **arguments)


def test_as_method():
    pg = PolicyGradient(LogRatio("teacher", "student"))
    for part in (pg, pg * 1, Objective(pg), Method(Objective(pg))):
        assert as_method(part).objective == Objective(pg)
    assert as_method("opd", discount=0.5) == load("opd", discount=0.5)
    with pytest.raises(UserError, match="belong to a method given by name"):
        as_method(Objective(pg), discount=0.5)


def test_lists_of_a_yaml_file_are_tuples():
    assert load("opd", clip=[0.1, 0.2]) == load("opd", clip=(0.1, 0.2)) and hash(
        load("opd", clip=[0.1, 0.2])
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("opd", "PolicyGradient(log(teacher/student))"),
        ("gkd", "Divergence(kind=jsd, support=full)"),
        ("exopd", "PolicyGradient(log(teacher/student) + 0.25 * log(teacher/reference))"),
        ("vopd", "PolicyGradient(log(teacher/student) + Gap(kind=reverse_kl))"),
        (
            "tropd",
            "PolicyGradient(log(teacher/student)) * Draw(exp(log(teacher/student))) * "
            "~Mark(guided)\n  + Divergence(kind=forward_kl, k=64, support=teacher) * "
            "~Draw(exp(log(teacher/student))) * ~Mark(guided)\n  + Likelihood() * Mark(guided) * "
            "0.001",
        ),
    ],
)
def test_a_method_prints_as_its_formula(name, text):
    assert str(load(name)) == text


def test_a_method_carries_what_lies_outside_its_objective():
    made = load("tropd")
    assert made.curriculum == TeacherPrefix() and made.needs == load("tropd").needs
    assert Method(Objective(Likelihood())) != Method(
        Objective(Likelihood()), curriculum=TeacherPrefix()
    )


def close_to(ema: Ema) -> Method:
    """What keeps the student close to a copy of itself."""
    return Method(Objective(PolicyGradient(LogRatio(ema.model, "student"))), companions=(ema,))


def test_what_stands_beside_the_student_is_joined() -> None:
    """Under + and *, once where both bring the same; its models are not the run's to open."""
    slow, fast = Ema(0.01), Ema(0.5, model="fast")
    assert close_to(slow).brought == {"ema"} and close_to(slow).opened == set()
    both = load("opd") + close_to(slow) + close_to(fast) + close_to(slow)
    assert both.companions == (slow, fast) and both.opened == {"teacher"}
    assert (load("opd") * weighted(slow)).companions == (slow,)
    assert (0.5 * close_to(slow)).companions == (slow,)


def weighted(ema: Ema) -> Method:
    """A weight that reads a copy of the student."""
    weight = LogRatio(ema.model, "student") > 0
    return Method(Objective(Likelihood() * weight), companions=(ema,))


def test_one_name_for_two_companions_is_refused() -> None:
    said = r"Ema\(rate=0.01.*Ema\(rate=0.5.*both to be read as the model 'ema'"
    for join in (lambda a, b: a + b, lambda a, b: a * weighted(b.companions[0])):
        with pytest.raises(UserError, match=said):
            join(close_to(Ema(0.01)), close_to(Ema(0.5)))
    with pytest.raises(UserError, match="'student', which is the run's own"):
        close_to(Ema(model="student"))


def test_who_the_teacher_is_when_methods_are_combined() -> None:
    """A sum has what either says; a weight leaves it to the method that it weighs; two that say
    different things of one model cannot be added.
    """
    opsd, sdft, opd = (load(name) for name in ("opsd", "sdft", "opd"))
    assert not opd.models
    assert (opd + opsd).models == opsd.models == (opsd + opd).models
    assert (opsd * load("iw_opd")).models == opsd.models
    assert (load("iw_opd") * sdft).models == {}
    with pytest.raises(UserError, match="the model 'teacher' of the first is"):
        opsd + sdft
