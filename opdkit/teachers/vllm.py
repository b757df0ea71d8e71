"""A teacher in a vLLM engine in this process: log-probs of the rollouts' tokens and of its own most
probable ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.models.engines.vllm_engine import Engine, EngineSettings
from opdkit.models.held import ENGINE, Held
from opdkit.models.identity import Identity, identify
from opdkit.models.layout import Layout
from opdkit.models.load import load_tokenizer
from opdkit.models.shapes import Shape
from opdkit.models.tokenizers import (
    real_vocabulary,
    refuse_other_tokenizer,
    same_tokenizer,
    shared_ids,
    usable,
)
from opdkit.objective.facts import Fact, TopFact
from opdkit.objective.needs import Needs
from opdkit.objective.supply import Tensors
from opdkit.teachers.base import in_order
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.refuse import refuse_facts
from opdkit.teachers.scored_facts import without_positions
from opdkit.teachers.speech import ends_of, note_questions
from opdkit.teachers.teacher import Teacher


def deepest(needs: Needs, model: str) -> int:
    """The most probable ids of a model that are read per token; 0: none."""
    return max((fact.depth(model) for fact in needs.of(model)), default=0)


@dataclass
class VllmScorer:
    """Answers with numbers, in one batch per step.

    `k` is the depth that the engine is started for (vLLM's max_logprobs).
    """

    model: str
    tokenizer: Any
    settings: EngineSettings = EngineSettings()
    k: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        self.engine = Engine(
            self.model,
            self.settings,
            max_logprobs=max(1, min(self.k, real_vocabulary(self.tokenizer))),
            trust_remote_code=self.trust_remote_code,
        )
        self.tokens = usable(self.tokenizer, self.engine.rows)
        if self.engine.rows > self.tokens:
            self.engine.head(self.tokens)

    def facts(
        self,
        wanted: Collection[Fact],
        layout: Layout,
        positions: Tensor,
        ids: Mapping[TopFact, Tensor],
    ) -> Tensors:
        """The wanted facts [N] or [N, k] at flat positions [N].

        `ids` are not read: the engine knows its own most probable ones only.
        """
        k = max((f.depth(f.models[0]) for f in wanted), default=0)
        if k > self.k:
            raise ValueError(
                f"the engine was started for {self.k} log-probs per token, and {k} are asked for"
            )
        if not len(positions):
            return {fact: without_positions(fact, positions.device) for fact in wanted}
        rows, columns = positions.cpu() // layout.width, positions.cpu() % layout.width
        index = [(rows == b).nonzero()[:, 0] for b in rows.unique().tolist()]
        sequences, starts, names = [], [], []
        for at in index:
            rollout = layout.rollouts[int(rows[at[0]])]
            starts.append(len(rollout.prompt) + int(columns[at].min()))
            sequences.append(
                (rollout.prompt + rollout.tokens)[
                    : len(rollout.prompt) + int(columns[at].max()) + 1
                ]
            )
            names.append(f"rollout {rollout.id} at {self.model}")
            self._fits(len(sequences[-1]), names[-1])
        self.engine.wake()
        scored = self.engine.score(sequences, starts, names, min(k, self.tokens))
        self.engine.sleep()
        made: Tensors = {}
        for fact in wanted:
            values = [
                fact.of_notes(s)[columns[at] - columns[at].min()] for s, at in zip(scored, index)
            ]
            made[fact] = in_order(values, index, positions.device)
        return made

    def _fits(self, length: int, who: str) -> None:
        if length + 1 > self.engine.limit:
            raise UserError(
                f"{who}: {length} tokens and one more do not fit the teacher's context of "
                f"{self.engine.limit}. Nothing is cut, as a cut context changes every score: raise "
                f"teacher.max_model_len to at least {length + 1}, or lower max_completion_length "
                "or data.max_prompt_length"
            )

    def close(self) -> None:
        """Ends the engine and frees its memory."""
        self.engine.close()


@dataclass(frozen=True, kw_only=True)
class VllmTeacher(EngineSettings, Teacher):
    """A checkpoint in a vLLM engine in this process: log-probs of the tokens and of its own most
    probable ones.
    """

    kind = "vllm"
    main = "model"
    model: str

    def open(self, context: TeacherContext) -> VllmScorer:
        return context.once(f"{self!r} as {context.role}", lambda: self._open(context))

    def _open(self, context: TeacherContext) -> VllmScorer:
        """The engine, started with as many log-probs per token as the method reads."""
        method, tokenizer = context.method, context.tokenizer
        role = context.role
        unsaid = [fact for fact in method.needs.of(role) if not self.says(fact, role)]
        refuse_facts(method.name or "own", "a vllm teacher", unsaid)
        theirs = self._tokenizer(context)
        refuse_other_tokenizer(self.model, tokenizer, theirs)
        if (shared_ids(tokenizer, theirs) or 0) < real_vocabulary(tokenizer):
            raise UserError(
                f"the student has tokens that {self.model} has not "
                f"({same_tokenizer(tokenizer, theirs)}), and an engine cannot score an answer that "
                "holds them: use the teacher in this process (teacher=MODEL), which lets the "
                "student write common tokens only"
            )
        note_questions(self.model, theirs, context)
        if self.enable_sleep_mode and self.sleep_level == 2:
            raise UserError(
                "teacher.sleep_level=2 drops weights that nobody sends again: use 1, which keeps "
                "them in the machine's memory meanwhile"
            )
        return VllmScorer(
            self.model,
            tokenizer,
            self,
            k=deepest(method.needs, role),
            trust_remote_code=context.trust_remote_code,
        )

    def _tokenizer(self, context: TeacherContext) -> Any:
        return context.once(
            f"tokenizer of {self.model}",
            lambda: load_tokenizer(self.model, context.trust_remote_code),
        )

    def ends(self, context: TeacherContext) -> frozenset[int]:
        return ends_of(self.model, self._tokenizer(context), context)

    def held(self, role: str, dtype: str, shape_of: Callable[[str], Shape]) -> list[Held]:
        return [
            Held(
                role,
                self.model,
                ENGINE,
                shape_of(self.model),
                self.dtype or "bfloat16",
                engine=self.gpu_memory_utilization,
            )
        ]

    def identity(self) -> Identity:
        return identify(self.model)

    def precision(self, usual: str) -> str:
        return self.dtype or usual
