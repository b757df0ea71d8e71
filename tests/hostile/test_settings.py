"""The door of settings: overrides and files of runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from opdkit.base.config import leaves
from opdkit.run.settings import Run
from tests.hostile.conftest import Ground
from tests.hostile.judge import EITHER, REFUSED, WORKS, Attack

pytestmark = pytest.mark.hostile

NO_NUMBERS = ("nan", "inf", "text", "[1, two]", "{a: 1}", "9" * 5000)
LARGE = "1000000000000000000000"  # too large for an integer, and for some floats
NUMBERS = [
    "steps",
    "max_tokens",
    "prompts_per_step",
    "overlong_margin",
    "micro_batch_tokens",
    "keep_samples",
    "sample_every",
    "term_gradients_every",
    "seed",
    "sampling.temperature",
    "sampling.top_p",
    "sampling.top_k",
    "sampling.min_p",
    "sampling.max_completion_length",
    "sampling.num_generations",
    "optim.learning_rate",
    "optim.warmup_steps",
    "optim.weight_decay",
    "optim.eps",
    "optim.max_grad_norm",
    "optim.passes",
    "optim.minibatches",
    "lora.r",
    "lora.alpha",
    "lora.dropout",
    "checkpoint.every",
    "checkpoint.keep",
    "data.limit",
    "data.max_prompt_length",
    "evaluate.every",
    "evaluate.num_generations",
    "evaluate.sampling.temperature",
]
EVALUATE = ("reward=math", "evaluate.data={data}")

# what is wrong with it: overrides
OVERRIDES = {
    "no value": ("steps",),
    "no name": ("=5",),
    "no setting of that name": ("stepz=5",),
    "below a number": ("steps.x=5",),
    "two dots": ("optim..eps=1e-8",),
    "a dot at the end": ("optim.=1",),
    "a group as a number": ("optim=3",),
    "a group as a list": ("optim=[1]",),
    "an unfinished bracket": ("optim.betas=[0.9",),
    "brackets 3,000 deep": ("optim.betas=" + "[" * 3000,),
    "one beta": ("optim.betas=[0.9]",),
    "betas of one": ("optim.betas=[1.0, 0.95]",),
    "a tag of Python": ("seed=!!python/object/apply:os.getpid []",),
    "a device without memory": ("device=meta",),
    "a device that is not there": ("device=cuda:99",),
    "no device": ("device=",),
    "a dtype of others": ("dtype=float16",),
    "a dtype of the teacher that is none": ("teacher_dtype=float7",),
    "no output": ("output=",),
    "an output with a NUL": ('output="a\\0b"',),
    "an output below a file": ("output=/dev/null/x",),
    "a schedule of others": ("optim.schedule=exponential",),
    "no targets of adapters": ("lora.r=2", "lora.targets=[]"),
    "targets that no layer has": ("lora.r=2", "lora.targets=[nothing]"),
    "a tracker of others": ("trackers=[mlflow]",),
    "trackers as text": ("trackers=tensorboard",),
    "samples at temperature 0 for Pass@2": (
        *EVALUATE,
        "evaluate.num_generations=2",
        "evaluate.ks=[3]",
    ),
    "Pass@0": (*EVALUATE, "evaluate.ks=[0]"),
    "no k": (*EVALUATE, "evaluate.ks=[]"),
    "an evaluation without reward": ("evaluate.data={data}",),
    "reward of others": ("reward=maths",),
    "a reward that is a number": ("reward=3",),
    "an empty reward": ("reward=",),
    "a pattern that is none": ("reward=regex:(",),
    "a sampler of others": ("sampler=tgi",),
    "a sampler with a wrong setting": ("sampler.speed=3",),
    "an empty stop": ("sampling.stop=['']",),
    "stop as text": ("sampling.stop=end",),
    "a column of a column": ("data.columns={prompt: {a: b}}",),
    "columns as a list": ("data.columns=[prompt]",),
    "a column that is not there": ("data.columns={prompt: nothing}",),
    "a split of a file": ("data.split=test",),
    "a chat of a tokenizer": ("data.chat=maybe",),
    "overlong margin without reward": ("overlong_margin=2",),
    "dynamic sampling without reward": ("dynamic_sampling=true",),
    "rollouts of others": ("rollouts=teacher",),
    "arguments as a list": ("method.name=tropd", "method.arguments=[1, 2]"),
    "a method as a number": ("method=3",),
    "a method as a list": ("method=[opd]",),
    "times as a number": ("method.name=opd", "method.times=3"),
    "models of a number": ("models.x=3",),
    "a curriculum of others": ("curriculum=hardest",),
    "a curriculum as a number": ("curriculum=3",),
    "a curriculum without a kind": ("curriculum.sigma=0.2",),
    "a curriculum whose kind is a list": ("curriculum={kind: [frontier]}",),
    "a kernel of others": ("curriculum=frontier", "curriculum.kernel=flat"),
    "a frontier without reward": ("curriculum=frontier",),
    "a ladder that nobody climbs": ("curriculum=entropy_length",),
    "a ladder that falls": ("curriculum={kind: entropy_length, ladder: [8, 4]}",),
    "a teacher as a number": ("teacher=3",),
    "a teacher of no kind": ("teacher={kind: oracle}",),
    "a teacher as a list": ("teacher=[a, b]",),
    "a mixture of one": ("teacher={kind: mixture, of: {a: x}}",),
    "an URL that is none": ("teacher=server:http://",),
    "a port out of range": ("teacher=server:http://127.0.0.1:99999",),
    "a scheme of others": ("teacher=server:ftp://127.0.0.1",),
    "a teacher of no name": ("teacher=",),
    "quantised to 3 bits": ("lora.r=2", "lora.quantize=3bit"),
}
HARMLESS = {
    "no clipping": ("max_grad_norm=0",),
    "an integer as text of a float": ("learning_rate=1",),
    "null where there may be none": ("max_tokens=null", "data.limit=null"),
    "greedy": ("temperature=0",),
    "a date as a name": ("output=2024-13-45",),
    "twice the same": ("steps=2", "steps=1"),
}
FILES: dict[str, str | bytes] = {
    "nothing": "",
    "only a comment": "# steps: 1",
    "a list": "- a\n- b",
    "a number": "3",
    "text": "hello",
    "Latin-1": "student: caf\u00e9".encode("latin-1"),
    "UTF-16": "steps: 1".encode("utf-16"),
    "zeros": bytes(100),
    "weights": bytes(range(256)) * 10,
    "a tab": "steps:\n\t1",
    "a key twice": "steps: 1\nsteps: 2",
    "a key that is a list": "? [a]\n: 1",
    "brackets 3,000 deep": "seed: " + "[" * 3000,
    "a date that is none": "output: 2024-13-45",
    "a time stamp that is none": "seed: !!timestamp 2024-99-99",
    "5,000 digits": "seed: " + "7" * 5000,
    "a number for a key": "1: 2",
    "no student": "teacher: x\ndata: y",
    "itself": "method: &a {name: opd, arguments: {x: *a}}",
    "an alias of nothing": "student: *a",
    "a tag of Python": "student: !!python/object/apply:os.system ['touch x']",
    "a bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh")),
    "HTML": "<!DOCTYPE html><html><body>404: not found</body></html>",
    "JSON that is cut": '{"student": "x", "tea',
}


def numbers() -> Iterator[tuple[str, str]]:
    """Every number of a run's settings, with what is no number and one below its range."""
    for name in NUMBERS:
        for value in (*NO_NUMBERS, "-1", "true", LARGE):
            yield name, value


def test_every_number_of_the_settings_is_listed() -> None:
    """A new setting with a number in it is tried as well."""
    known = leaves(Run)
    assert set(NUMBERS) <= set(known.values())


def overrides(ground: Ground) -> Iterator[Attack]:
    for name, value in numbers():
        shown = value if len(value) < 20 else f"{len(value)} digits"
        end = EITHER if value == LARGE else REFUSED
        yield ground.train(f"{name}={shown}", *_needed(name, ground), f"{name}={value}", end=end)
    for end, table in ((REFUSED, OVERRIDES), (WORKS, HARMLESS)):
        for what, settings in table.items():
            filled = [text.replace("{data}", ground.data) for text in settings]
            yield ground.train(what, *filled, end=end)


def _needed(name: str, ground: Ground) -> list[str]:
    """What has to be set for a setting to be read."""
    if name.startswith("evaluate"):
        return [text.replace("{data}", ground.data) for text in EVALUATE]
    return ["reward=math"] if name == "overlong_margin" else []


def test_overrides(ground: Ground, judged) -> None:
    judged("settings: key=value", overrides(ground))


def test_files_of_runs(ground: Ground, judged) -> None:
    def attacks() -> Iterator[Attack]:
        for number, (what, content) in enumerate(FILES.items()):
            path = ground.file(f"runs/{number}.yaml", content)
            yield Attack(what, ("train", path, "output={out}"))
        folder = str(ground.folder)
        for what, path in (("a folder", folder), ("nothing there", f"{folder}/no.yaml")):
            yield Attack(what, ("train", path, "output={out}"))
        yield Attack("a device", ("train", "/dev/zero", "output={out}"))
        yield Attack("a name of 5,000 letters", ("train", "x" * 5000))
        yield Attack("a recipe that is none", ("train", "--recipe", "gsm9k"))
        yield Attack("no arguments", ("train",))
        yield Attack("only a student", ("train", "--student", ground.student))

    judged("settings: files", attacks())
