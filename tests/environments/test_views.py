"""A teacher's view of an episode: its opening written anew, all that followed as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from opdkit.data import Prompts
from opdkit.data.views import View, view_of
from opdkit.environments import Dialogue, EpisodeSampler
from opdkit.models.body import head_of
from opdkit.objective.facts import LogpFact
from opdkit.objective.needs import Needs
from opdkit.sampling import HFSampler
from opdkit.teachers import LocalModel
from opdkit.teachers.views.privileged import Viewed
from opdkit.train.gather import gather
from opdkit.types import Prompt, Sampling
from tests.common.tiny import tiny_model, tiny_tokenizer
from tests.environments.guess import Guess


@pytest.mark.parametrize("chat", [True, False])
def test_it_scores_the_same_turns_behind_the_other_opening(chat: bool) -> None:
    """The plain view is the opening to the token; another one's log-probs are those of the whole
    episode with its prompt replaced.
    """
    tokenizer, model = tiny_tokenizer(chat_template=chat), tiny_model(seed=3).double()
    sampler = EpisodeSampler(
        HFSampler(model, tokenizer), Dialogue(tokenizer), Guess, "guess", max_turns=3, turn_tokens=4
    )
    prompt = Prompt("a", [], {"id": "a", "prompt": "", "letter": "q", "hint": "It is odd."})
    rollouts = sampler.sample([prompt], Sampling(1.0, max_completion_length=200), seed=0)

    def render(row: Any) -> list[int]:
        return Prompts([row], tokenizer, chat=chat)[0].tokens

    local = LocalModel(model, head_of(model))
    for name in ("question", "hint"):
        teacher = Viewed(local, view_of(name), render)
        seen = teacher.seen(rollouts[0], rollouts)
        assert (seen.prompt == rollouts[0].prompt) == (name == "question")
        assert seen.tokens == rollouts[0].tokens and seen.turns == rollouts[0].turns

        def logp(scorer: Any, rows: Any) -> torch.Tensor:  # [B, T]
            needs = Needs(frozenset({LogpFact("teacher")}))
            return gather(rows, needs, {"teacher": scorer}, dtype=torch.float64)["teacher"].logp

        row = View(name).row(rollouts[0])
        by_hand = [replace(rollouts[0], prompt=render(row))]
        torch.testing.assert_close(logp(teacher, rollouts), logp(local, by_hand), rtol=0, atol=1e-9)
