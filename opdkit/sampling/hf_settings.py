"""The kind of sampler that is the student itself, in this process."""

from __future__ import annotations

from dataclasses import dataclass

from opdkit.base.rules import Rules, at_least, follow
from opdkit.models.held import Held
from opdkit.sampling.kv_cache import CPU_BYTES, FREE_SHARE, check_states
from opdkit.sampling.settings import Pace, Room, SamplerContext, SamplerSettings, Sizes
from opdkit.types import Sampler

HF: Rules = {
    "max_batch_tokens": at_least(
        1,
        "it is the tokens of all rollouts that are sampled at once",
        null="what the device has room for",
    )
}


@dataclass(frozen=True)
class HfSettings(SamplerSettings):
    """The sampler in this process, on the student itself: nothing has to be sent anywhere."""

    kind = "hf"
    on_student = True
    # rows x longest possible row; null: half of a GPU's free memory, 2 GiB of a CPU's
    max_batch_tokens: int | None = None

    def __post_init__(self) -> None:
        follow(HF, self)

    def open(self, context: SamplerContext) -> Sampler:
        from opdkit.sampling.hf import HFSampler

        check_states(context.model)
        return HFSampler(
            context.model,
            context.tokenizer,
            head=context.head_now,
            max_batch_tokens=self.max_batch_tokens,
            guide=context.guide,
            watch=context.watch,
        )

    def room(self, sizes: Sizes) -> Room:
        """The key-value cache, with as many rollouts at once as half of the free memory holds."""
        # as the sampler counts
        planned = sizes.student.cached_token(sizes.products)
        memory = FREE_SHARE * sizes.free if sizes.gpu else CPU_BYTES
        fitting = (self.max_batch_tokens or int(memory / planned)) // sizes.longest
        rows = max(1, min(sizes.rollouts, fitting))
        token = planned + (sizes.guide.cached_token(sizes.guide.dtype) if sizes.guide else 0)
        name = f"key-value cache of {rows} rollouts at once"
        return Room(name, rows * sizes.longest * token, rows)

    def pace(self, student: Held, products: str, launch: float, graph: float) -> Pace:
        return Pace(student.product_width(products), student.cached_token(products), launch)
