"""A small policy learns to swing a pendulum up and to hold it there, from a better one: the models
and the run of `vla_opd` on a task of control.

Both are language models whose words are bins of numbers. They copy an engineer's controller first:
the teacher from many episodes, also disturbed ones, the student from a few, so that it errs as soon
as it is where these never were.

pip install 'opdkit[agents]'
python examples/control.py runs/control
opdkit train runs/control/run.yaml
"""

import json
import math
import random
import sys
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from opdkit.environments.control import Control, ControlSettings, action_bins, tokenizer

BINS, SEEN = 15, 64
TASK = {
    "kind": "control",
    "task": "Pendulum-v1",
    "bins": BINS,
    "observed": SEEN,
    "hold": 4,  # 50 decisions, 0.2 s each
    "returns": [-1600, 0],  # the reward of a return: 0 for hanging, 1 for standing all along
    "solved": -300,  # swung up and held
}
LENGTH = 199  # tokens of an episode after its opening: an action, then three observed numbers
OTHERS = 100_000  # the first start of those that the run never sees


def controller(angle: float, speed: float) -> float:
    """An engineer's: pumps energy until there is enough to stand, then holds (angle 0 is up)."""
    angle = (angle + math.pi) % (2 * math.pi) - math.pi
    if math.cos(angle) > 0.85 and abs(speed) < 4:
        return max(-2.0, min(2.0, -10 * angle - 3 * speed))
    lacking = 15 - (speed**2 / 2 + 15 * math.cos(angle))
    return math.copysign(max(-2.0, min(2.0, lacking)), lacking * (1 if speed >= 0 else -1))


def recorded(settings: ControlSettings, start: int, noise: float, words) -> tuple[list, list]:
    """An episode's token ids, and the label of each: the bin of the controller's action at actions,
    though others are taken now and then; -100 at what is observed.
    """
    chance, world = random.Random(start), settings.make()
    taken = right = world.reset({"start": start}, 0)
    while not world.done:
        best = f"<a{bin_of(world)}>"
        act = f"<a{chance.randrange(BINS)}>" if chance.random() < noise else best
        seen = world.step(act)
        taken, right = taken + act + seen, right + best + seen
    world.close()
    first = len(words) - BINS  # id of the first action
    labels = [i - first if i >= first else -100 for i in words(right).input_ids]
    return words(taken).input_ids, labels


def bin_of(world: Control) -> int:
    """What the controller does there."""
    angle, speed = world.world.unwrapped.state
    return action_bins([controller(angle, speed)], world.world.action_space, BINS)[0]


def cloned(width: int, episodes: int, noise: float, steps: int, words) -> Qwen3ForCausalLM:
    """A policy that has learnt to act as the controller does in so many episodes."""
    settings = ControlSettings(**{k: v for k, v in TASK.items() if k != "kind"})
    made = [recorded(settings, OTHERS + n, noise, words) for n in range(episodes)]
    ids, labels = (torch.tensor(part) for part in zip(*made))
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=width // 4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.08,
            pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        some = torch.randint(len(ids), (16,))
        logits = model(input_ids=ids[some, :-1], use_cache=False).logits[..., -BINS:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[some, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1}: {loss.item():.3f} nats per action", file=sys.stderr)
    return model.eval()


def make(folder: Path) -> None:
    """Teacher, student and the run of both, in `folder`."""
    words = tokenizer(BINS, SEEN)
    for name, plan in {"teacher": (64, 400, 0.25, 700), "student": (48, 200, 0.25, 250)}.items():
        model = cloned(*plan, words)
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    held_out = {**TASK, "first": OTHERS - 64, "starts": 64}
    run = {
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "environment": TASK,
        "method": f"vla_opd(bins={BINS})",
        "output": str(folder / "run"),
        "steps": 100,
        "prompts_per_step": 2,  # 8 episodes from each start
        "sampling": {"max_completion_length": LENGTH},
        "evaluate": {"data": "environment", "environment": held_out, "teacher": True},
        "optim": {"learning_rate": 2e-3, "warmup_steps": 5, "schedule": "cosine"},
    }
    (folder / "run.yaml").write_text(json.dumps(run, indent=2) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/control"))
