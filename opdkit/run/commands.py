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
from opdkit.environments import EnvironmentSettings
from opdkit.environments.kinds import environment_of
from opdkit.eval import EvalResult, evaluate_model
from opdkit.eval.evaluate import check_ks, drawn
from opdkit.models.device import device_of
from opdkit.models.load import load_model, load_tokenizer
from opdkit.models.precision import widen
from opdkit.rewards import load_reward
from opdkit.run.episodes import episodic
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
    environment: Any = None,
) -> EvalResult:
    """Avg@k and Pass@k of a model on a data set, with 95 % confidence intervals over problems.

    environment: in which it acts, and which then scores instead of a reward; data "environment":
    its own tasks.
    """
    chosen = drawn(sampling or Sampling(), num_generations)
    check_ks(num_generations, ks)
    check_sampling(chosen)
    sampler = open_sampler(model, tokenizer, dtype, trust_remote_code=trust_remote_code)
    data = path_text(data)
    settings = (
        data if isinstance(data, Data) else Data(data if isinstance(data, str) else "in memory")
    )
    world = opened_world(environment)
    given = None if isinstance(data, (str, Data)) else as_rows(data)
    rows = read_rows(settings, given, seed, world)
    scorer = load_reward(reward) if world is None else None
    if scorer is None and world is None:
        raise UserError(
            "an evaluation needs a reward: math, code, exact, reasoning_gym, regex:PATTERN, "
            "judge:URL or file.py:function"
        )
    prompts = make_prompts(settings, rows, sampler.tokenizer)
    return evaluate_model(
        episodic(world, sampler, prompts, sampler.model),
        list(prompts),
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
    environment: Any = None,
) -> list[Rollout]:
    """Responses of a model to texts, rows or a data set; or its episodes in an environment."""
    sampler = open_sampler(model, tokenizer, dtype, trust_remote_code=trust_remote_code)
    prompts = path_text(prompts)
    settings = (
        prompts
        if isinstance(prompts, Data)
        else Data(prompts if isinstance(prompts, str) else "in memory")
    )
    given = None if isinstance(prompts, (str, Data)) else as_rows(prompts)
    world = opened_world(environment)
    asked = make_prompts(settings, read_rows(settings, given, seed, world), sampler.tokenizer)
    acting = episodic(world, sampler, asked, sampler.model)
    made: list[Rollout] = acting.sample(list(asked), sampling or Sampling(), seed=seed)
    return made


def opened_world(environment: Any) -> EnvironmentSettings | None:
    """An environment that can be used here; None where none is named."""
    if environment is None:
        return None
    world = environment_of(environment)
    world.check()
    return world
