"""Methods that hold a ratio, times the weight of every other method and the other way round: it
passes `check`, or is refused with a reason.
"""

from __future__ import annotations

import pytest

from opdkit.base.errors import UserError
from opdkit.methods import METHODS
from opdkit.methods.method import load
from opdkit.testing import check

MINE = ("clip_cov", "kl_cov", "mdpo", "f_dpg")
FORMS = (*MINE, "opd(kind=jsd, as_credit=true)", "grpo(divergence_mask=0.05)", "grpo(smooth=0.2)")


def works(text: str) -> bool:
    """Whether a product passes `check`; else it was refused, with a reason."""
    try:
        made = load(text)
    except UserError as refusal:
        assert len(str(refusal)) > 60, text
        return False
    return not check(made).failed


@pytest.mark.parametrize("weight", METHODS)
def test_times_another_methods_weight(weight):
    found = {base: works(f"{base} * {weight}") for base in FORMS}
    if weight in ("iw_opd", "tip", "paced", "drift_gating", "position_opd", "scope"):
        assert all(found.values()), found


@pytest.mark.parametrize("base", METHODS)
def test_their_own_weight_is_none(base):
    """What they leave out or hold is inside their losses."""
    for weight in MINE:
        with pytest.raises(UserError, match="has no weight to multiply another method by"):
            load(f"{base} * {weight}")


@pytest.mark.parametrize("other", ["opd", "grpo", "tropd", "gkd", "grpo(loss=gspo)"])
@pytest.mark.parametrize("mine", MINE)
def test_sums(mine, other):
    assert not check(load(f"{mine} + 0.5 * {other}")).failed
