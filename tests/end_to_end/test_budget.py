"""A run with a budget of tokens by domain: what is learnt is within it, and told."""

from __future__ import annotations

from pathlib import Path

import pytest

from opdkit.base.errors import UserError
from opdkit.base.files import read_lines
from opdkit.run.launch import execute
from tests.end_to_end.conftest import Shop, gsm8k_rows, write_rows


@pytest.mark.parametrize("method", ["opd", "grpo"])
def test_a_step_learns_at_most_its_tokens(shop: Shop, tmp_path: Path, method: str) -> None:
    """Four prompts of two subjects, two responses of up to 8 tokens each: 32 of each subject, of
    which math may have 17: two responses, or one group.
    """
    rows = [{**row, "subject": ("math", "code")[i % 2]} for i, row in enumerate(gsm8k_rows(4))]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    settings = {"method": method, "reward": shop.reward, "data": data, "domain": "subject"}
    run = shop.run(
        tmp_path / "run", **settings, prompts_per_step=4, token_budget={"math": 17}, ahead=1
    )
    execute(run)
    for line in read_lines(tmp_path / "run" / "metrics.jsonl"):
        assert 0 < line["tokens_by_domain/math"] <= 17 < line["tokens_by_domain/code"]
        dropped = line["dropped_by_domain/math"]
        assert dropped >= 1 and line["dropped_by_domain/code"] == 0
        if method == "grpo":
            assert dropped == 2
    with pytest.raises(UserError, match=r"token_budget\.maths is for no row.*code, math.*math"):
        execute(shop.run(tmp_path / "no", **settings, token_budget={"maths": 17}))
