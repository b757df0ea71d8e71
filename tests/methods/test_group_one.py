"""What every method of the first group must keep, with its defaults and with each other value of
its arguments.
"""

from __future__ import annotations

import pickle
import random

import pytest
import torch

from opdkit.methods import METHODS
from opdkit.methods.method import load
from opdkit.testing import KEYS, Case, check, fabricate
from tests.common.toy import naive

LAYER = [{"clip": (0.2, 0.2)}, {"clip": (0.1, 0.3), "dual_clip": 3.0}, {"rollout_cap": 1.1}]
SUPPORTS = [
    {"support": s, "k": 5, "rest": r}
    for s in ("teacher", "student", "union")
    for r in ("renormalise", "raw", "target", "tail")
]
KINDS = [
    {"kind": k}
    for k in (
        "forward_kl",
        "jsd",
        "skew_forward",
        "skew_reverse",
        "alpha",
        "hellinger2",
        "tv",
        "chi2",
    )
]
OPD = [
    {"support": "full"},
    {"beta": 0.1},
    {"beta": 0.0},
    {"beta": 1.0},
    {"beta": 0.5, "k": 5},
    {"discount": 0.9},
    {"discount": 1.0},
]
OPD.append({"kind": "forward_kl", "support": "teacher", "k": 5, "rest": "raw"})
ARGUMENTS = {
    "opd": [*OPD, *SUPPORTS, *KINDS, *LAYER],
    "gkd": [
        {"beta": 0.0},
        {"beta": 0.1},
        {"beta": 1.0},
        {"lmbda": 0.5},
        {"temperature": 2.0},
        {"normalised": True},
    ],
    "gopd": [{"scale": 0.0}, {"scale": 0.5}, *LAYER],
    "exopd": [{"scale": 1.5}, *LAYER],
    "tropd": [
        {"k": 4},
        {"beta": 0.5},
        {"outliers": "mask"},
        {"outliers": "clip"},
        {"outliers": "clip", "floor": -0.5},
    ]
    + [{"rest": r} for r in ("renormalise", "target", "tail")]
    + [{"outlier_gradient": "credit"}, {"prefix": "credit"}, *LAYER],
    "iw_opd": [{"gamma": 0.0}, {"gamma": 2.0}, {"mean_one": True}, *LAYER],
    "position_opd": [
        {"part": "last"},
        {"share": 0.6},
        {"anneal": "cosine"},
        {"anneal": "linear"},
        *LAYER,
    ],
    "scope": [{"tau": 0.5}, {"student_power": -1}, {"teacher_power": 1}, *LAYER],
    "vopd": [{"k": 5}, *LAYER],
}
EVERY = [
    pytest.param(n, a, id=f"{n}-{a}") for n, others in ARGUMENTS.items() for a in ({}, *others)
]
DEFAULTS = sorted(METHODS)


@pytest.mark.parametrize(("name", "arguments"), EVERY)
def test_check(name, arguments):
    assert not check(load(name, **arguments)).failed


# over spans of text: their values and gradients are in test_uld.py and test_gold.py
ALIGNED = ("uld", "gold")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [*EVERY, *(pytest.param(n, {}, id=n) for n in DEFAULTS if n not in (*ARGUMENTS, *ALIGNED))],
)
def test_the_chunked_pass_equals_a_dense_graph(name, arguments):
    objective = load(name, **arguments).objective
    case = fabricate(objective, seed=5)
    loss, grad = naive(objective, case)
    for chunk in (None, 1, 3, 10_000):
        out = case.run(objective, chunk=chunk)
        assert (
            abs(out.loss - loss) <= 1e-9 * max(1.0, abs(loss))
            and (out.grad - grad).norm() <= 1e-9 * grad.norm()
        )
    assert grad.norm() > 0


def shuffled(case: Case, order: list[int], pad: int, g: torch.Generator) -> Case:
    """The rollouts in another order, with `pad` columns of noise behind them."""

    def move(x: torch.Tensor, fill) -> torch.Tensor:
        return torch.cat([x[order], fill(len(x), pad, *x.shape[2:])], 1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def off(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bool)

    return Case(
        tokens=move(case.tokens, lambda *s: torch.randint(131, s, generator=g)),
        student=move(case.student, noise),
        mask=move(case.mask, off),
        models={k: move(v, noise) for k, v in case.models.items()},
        before=move(case.before, noise),
        sampler=move(case.sampler, noise),
        columns={k: torch.as_tensor(v)[order] for k, v in case.columns.items()},
        marks={k: move(v, lambda *s: ~off(*s)) for k, v in case.marks.items()},
        settings=case.settings | {"keys": KEYS[order]},
    )


@pytest.mark.parametrize(("name", "arguments"), EVERY)
def test_the_gradient_does_not_depend_on_how_the_step_is_laid_out(name, arguments):
    objective = load(name, **arguments).objective
    case, rng, g = fabricate(objective, seed=7), random.Random(7), torch.Generator().manual_seed(7)
    base = case.run(objective)
    for chunk in (1, 3, 10_000):
        order, pad = rng.sample(range(6), 6), rng.randrange(1, 6)
        cuts = sorted(rng.sample(range(1, 6), rng.randrange(4)))
        rows = rng.sample(range(6), 6)
        parts = [rows[a:b] for a, b in zip([0, *cuts], [*cuts, 6])]
        out = shuffled(case, order, pad, g).run(objective, parts, chunk)
        back = torch.zeros_like(base.grad)
        back[order] = out.grad[:, :7]
        assert (out.grad[:, 7:] == 0).all() and (back - base.grad).norm() <= 1e-9 * base.grad.norm()
        assert abs(out.loss - base.loss) <= 1e-9 * max(1.0, abs(base.loss))


@pytest.mark.parametrize(("name", "arguments"), EVERY)
def test_methods_are_values(name, arguments):
    a, b = load(name, **arguments), load(name, **arguments)
    assert a == b and hash(a) == hash(b) and pickle.loads(pickle.dumps(a)) == a
    assert load(name, **dict(a.arguments)) == a and arguments.items() <= dict(a.arguments).items()


def test_each_argument_makes_another_method():
    for name, others in ARGUMENTS.items():
        made = [load(name, **a) for a in ({}, *others)]
        assert len({(m.objective, m.curriculum) for m in made}) == len(made), name
        # lmbda lies outside the formula
        assert len({str(m) for m in made}) == len(made), name
