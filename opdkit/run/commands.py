"""What the command line does, as functions for a notebook: evaluate and sample a model, look at a
machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opdkit.base.errors import UserError
from opdkit.base.files import path_text
from opdkit.data.memory import as_rows
from opdkit.eval import EvalResult, evaluate_model
from opdkit.eval.evaluate import check_ks, drawn
from opdkit.models.device import device_of
from opdkit.models.load import load_model, load_tokenizer
from opdkit.models.precision import widen
from opdkit.rewards import load_reward
from opdkit.run.prompts import make_prompts, read_rows
from opdkit.run.settings import Data
from opdkit.sampling import HFSampler
from opdkit.sampling.draws import check_sampling
from opdkit.types import Rollout, Sampling


def open_sampler(
    model: Any,
    tokenizer: Any = None,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> HFSampler:
    """A sampler for a model by name, path, or as an object."""
    model, tokenizer = path_text(model), path_text(tokenizer)
    loaded = load_model(
        model, dtype=dtype, device=device_of(device), trust_remote_code=trust_remote_code
    )
    if isinstance(model, str):
        widen(loaded, model)
    named = tokenizer if tokenizer is not None else model
    if not isinstance(named, str) and not hasattr(named, "decode"):
        raise UserError("a loaded model comes without its tokenizer: pass tokenizer=")
    return HFSampler(loaded, load_tokenizer(named, trust_remote_code=trust_remote_code))


def eval_model(
    model: Any,
    data: str | Data | Sequence[Any],
    reward: Any = "math",
    *,
    sampling: Sampling | None = None,
    num_generations: int = 1,
    ks: Sequence[int] = (1,),
    tokenizer: Any = None,
    dtype: str = "float32",
    seed: int = 0,
    keep: str | Path | None = None,
    name: str = "eval",
    trust_remote_code: bool = False,
) -> EvalResult:
    """Avg@k and Pass@k of a model on a data set, with 95 % confidence intervals over problems."""
    chosen = drawn(sampling or Sampling(), num_generations)
    check_ks(num_generations, ks)
    check_sampling(chosen)
    sampler = open_sampler(model, tokenizer, dtype, trust_remote_code=trust_remote_code)
    data = path_text(data)
    settings = (
        data if isinstance(data, Data) else Data(data if isinstance(data, str) else "in memory")
    )
    rows = read_rows(settings, None if isinstance(data, (str, Data)) else as_rows(data), seed)
    scorer = load_reward(reward)
    if scorer is None:
        raise UserError(
            "an evaluation needs a reward: math, code, exact, reasoning_gym, regex:PATTERN, "
            "judge:URL or file.py:function"
        )
    prompts = list(make_prompts(settings, rows, sampler.tokenizer))
    return evaluate_model(
        sampler,
        prompts,
        scorer,
        chosen,
        ks=ks,
        seed=seed,
        name=name,
        keep=None if keep is None else Path(keep),
    )


def sample_model(
    model: Any,
    prompts: Sequence[Any] | str | Data,
    sampling: Sampling | None = None,
    *,
    tokenizer: Any = None,
    dtype: str = "float32",
    seed: int = 0,
    trust_remote_code: bool = False,
) -> list[Rollout]:
    """Responses of a model to texts, rows or a data set."""
    sampler = open_sampler(model, tokenizer, dtype, trust_remote_code=trust_remote_code)
    prompts = path_text(prompts)
    settings = (
        prompts
        if isinstance(prompts, Data)
        else Data(prompts if isinstance(prompts, str) else "in memory")
    )
    given = None if isinstance(prompts, (str, Data)) else as_rows(prompts)
    asked = list(make_prompts(settings, read_rows(settings, given, seed), sampler.tokenizer))
    return sampler.sample(asked, sampling or Sampling(), seed=seed)
