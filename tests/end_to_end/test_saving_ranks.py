"""What two processes save: each its own parts, read by any other number of them, refused by name
where damaged, and plain Hugging Face weights wherever somebody asks for them.
"""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from opdkit import UserError
from opdkit.cli import main
from opdkit.models.load import load_model
from opdkit.run.build import prepare
from opdkit.run.open import Models
from opdkit.run.settings import make_run
from opdkit.train import shards
from tests.common.tiny import VOCAB, save_tiny, tiny_tokenizer
from tests.end_to_end import saving
from tests.end_to_end.conftest import Shop, gsm8k_rows, write_rows
from tests.end_to_end.saving import done

STEPS = 3
METHODS = {"whole": "nash_mp", "tied": "opd", "adapters": "remix", "experts": "opd"}
TOGETHER = (("whole", "tied"), ("adapters", "experts"))  # in the same processes
EVERY = ["whole", "tied", *(pytest.param(name, marks=pytest.mark.ranks) for name in TOGETHER[1])]


@dataclass
class Saved:
    """Runs of two steps, which two processes do once they are asked for."""

    folder: Path
    values: dict[str, dict[str, Any]]  # of each

    def run(self, name: str) -> Path:
        if not (self.folder / name).exists():
            [names] = [some for some in TOGETHER if name in some]
            slow = {"tied": 0.2}
            cases = [{"values": self.values[n], "slow": slow.get(n, 0)} for n in names]
            status, said = saving.on(2, cases, self.folder)
            assert status == 0, said[:6000]
        return self.folder / name

    def copied(self, name: str, to: Path) -> dict[str, Any]:
        """A run, to go on with in another folder, for one step more."""
        shutil.copytree(self.run(name), to)
        return {**self.values[name], "output": str(to), "steps": STEPS}


def sparse(folder: Path) -> str:
    """A student of four experts, of which each token asks one."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = hf.Qwen3MoeConfig(
        vocab_size=VOCAB,
        num_hidden_layers=2,
        num_experts=4,
        num_experts_per_tok=1,
        max_position_embeddings=4096,
        initializer_range=0.2,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
        **sizes,
        **heads,
    )
    torch.manual_seed(4)
    hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def values(shop: Shop, folder: Path) -> dict[str, dict[str, Any]]:
    """A copy of the student beside it; adapters and three copies of them; experts; a tied head,
    whose checkpoints are written while it goes on.
    """
    rows = write_rows(folder / "rows.jsonl", gsm8k_rows(6))
    more: dict[str, dict[str, Any]] = {name: {} for name in METHODS}
    more["whole"] = {"evaluate": {"data": rows, "every": 1}, "optim": {"passes": 2}}
    more["adapters"] = {"lora": {"r": 4}, "method": {"name": "remix", "reincarnate": 1}}
    # grouped products of experts have no float64
    more["experts"] = {"student": sparse(folder / "sparse"), "dtype": "float32"}
    more["tied"] = {"student": save_tiny(folder / "tied_student", tie_word_embeddings=True)}
    out = {}
    for name, method in METHODS.items():
        settings = {"method": method, "dtype": "float64", "keep_samples": 0, "reward": shop.reward}
        settings["checkpoint"] = {"every": 1, "keep": 5, "background": name == "tied"}
        out[name] = shop.values(folder / name, **(settings | more[name]))
    return out


@pytest.fixture(scope="module")
def saved(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("saved")
    return Saved(folder, values(shop, folder))


def apart(a: Path, b: Path) -> float:
    """The largest difference of two models' weights, which must have the same names."""
    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert set(one) == set(other)
    return max(float((one[n] - other[n]).abs().max()) for n in one)


@pytest.mark.parametrize("name", EVERY)
def test_one_process_goes_on_where_two_were(saved: Saved, tmp_path: Path, name: str) -> None:
    """As if one process had done all of it, and what it saves has the names it would have had."""
    alone = {**saved.values[name], "output": str(tmp_path / "alone"), "steps": STEPS}
    done({"values": alone})
    on = saved.copied(name, tmp_path / "on")
    done({"values": on, "resume": True})
    # in float32 a gradient of rounding moves a weight by as much as the rate, with either sign
    most = 6e-3 if name == "experts" else 1e-9
    assert apart(tmp_path / "alone" / "model", tmp_path / "on" / "model") < most
    weights = "adapter_model.safetensors" if name == "adapters" else "model.safetensors"
    one, two = (load_file(tmp_path / f / "checkpoint-3" / weights) for f in ("alone", "on"))
    assert set(one) == set(two)
    lines = [(tmp_path / f / "metrics.jsonl").read_text().splitlines() for f in ("alone", "on")]
    norms = [[json.loads(line)["grad_norm"] for line in some] for some in lines]
    near = 1e-2 if name == "experts" else 1e-10
    assert norms[1] == pytest.approx(norms[0], rel=near) and len(norms[0]) == STEPS


@pytest.mark.parametrize("name", EVERY)
def test_export_makes_what_the_run_left(saved: Saved, tmp_path: Path, name: str) -> None:
    """Bit for bit the model at the end, loaded by plain from_pretrained; adapters alone, or merged
    in.
    """
    out, run = tmp_path / "out", saved.run(name)
    merge = ["--merge"] if name == "adapters" else []
    assert main(["export", str(run / "checkpoint-2"), str(out), *merge]) == 0
    assert apart(out, run / "model") == 0
    _, told = hf.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(hf.AutoTokenizer.from_pretrained(out)) == VOCAB
    left = {p.name for p in out.iterdir()}
    assert left.isdisjoint({"trainer_state.json", "run.json", "manifest.json", "shards"})
    assert main(["export", str(run / "checkpoint-2"), str(out)]) == 2, "it is there already"


@pytest.mark.ranks
def test_adapters_alone(saved: Saved, tmp_path: Path) -> None:
    from peft import PeftModel

    out, run = tmp_path / "out", saved.run("adapters")
    assert main(["export", str(run / "checkpoint-2"), str(out)]) == 0
    base = hf.AutoModelForCausalLM.from_pretrained(
        saved.values["adapters"]["student"], dtype=torch.float64
    )
    plain = PeftModel.from_pretrained(base, str(out), autocast_adapter_dtype=False)
    merged = plain.merge_and_unload().state_dict()
    left = load_file(run / "model" / "model.safetensors")
    assert max(float((merged[n] - x).abs().max()) for n, x in left.items()) < 1e-12


def test_the_best_is_plain_weights_too(saved: Saved) -> None:
    run = saved.run("whole")
    best = json.loads((run / f"checkpoint-{STEPS - 1}" / "trainer_state.json").read_text())
    folder = run / f"checkpoint-{best['best_step']}"
    plain = load_file(folder / "model.safetensors")
    parts = shards.weights_in(folder)
    assert set(plain) == set(parts) and all(torch.equal(plain[n], parts[n]) for n in plain)
    hf.AutoModelForCausalLM.from_pretrained(folder)


def test_each_process_writes_its_own_half_and_nothing_twice(saved: Saved) -> None:
    """Weights and two moments of eight bytes, a tied head once; tensors of one number are small."""
    checkpoint = saved.run("tied") / "checkpoint-2"
    model = hf.AutoModelForCausalLM.from_pretrained(saved.values["tied"]["student"])
    count = sum(p.numel() for p in model.parameters())
    told = shards.described(checkpoint)
    assert sum(t.numel() for t in told.values() if t.dim()) == 3 * count
    sizes = [p.stat().st_size for p in sorted((checkpoint / "shards").glob("*.distcp"))]
    assert len(sizes) == 2 and max(sizes) < 0.75 * sum(sizes) and sum(sizes) > 24 * count


def test_what_is_written_while_the_run_goes_on_is_the_moment_of_the_save(saved: Saved) -> None:
    """The first checkpoint was written once the second step had begun: it is that of one step."""
    first = shards.weights_in(saved.run("tied") / "checkpoint-1")
    second = shards.weights_in(saved.run("tied") / "checkpoint-2")
    start = hf.AutoModelForCausalLM.from_pretrained(saved.values["tied"]["student"])
    begun = {n: p.detach() for n, p in start.named_parameters()}
    pairs = (first, begun), (second, first)
    steps = [max(float((x - b[n]).abs().max()) for n, x in a.items()) for a, b in pairs]
    assert steps == pytest.approx([1e-3, 1e-3], rel=0.5), "AdamW moves by the rate at each step"


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "description"])
def test_damage_is_named_before_anything_is_loaded(
    saved: Saved, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved.copied("whole", tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint-2" / "shards"
    shard = folder / (".metadata" if damage == "description" else "__1_0.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(content[:-1] if damage == "cut" else content)
    monkeypatch.setattr(Models, "student", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=rf"checkpoint-2 is damaged: shards/{shard.name} "):
        prepare(make_run(run), resume=True)
    assert main(["export", str(folder.parent), str(tmp_path / "out")]) == 2


@pytest.mark.parametrize("name", [EVERY[1], EVERY[2]])
def test_what_to_do_with_such_a_checkpoint_as_a_model(saved: Saved, name: str) -> None:
    with pytest.raises(
        UserError, match=r"several processes wrote .* `opdkit export .*checkpoint-2 DIR`"
    ):
        load_model(str(saved.run(name) / "checkpoint-2"))


class Harm:
    def __reduce__(self) -> Any:
        return print, ("harm",)


def test_a_description_runs_no_code(saved: Saved, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(saved.run("whole") / "checkpoint-2", folder)
    (folder / "shards" / ".metadata").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(UserError, match=r"it names builtins.print, which no description does"):
        shards.weights_in(folder)
    assert "harm" not in capsys.readouterr().out


def test_another_student_is_refused(saved: Saved, tmp_path: Path) -> None:
    """Of other layers, and of other sizes, with the name of the tensor."""
    from opdkit.train.settings import Optim
    from opdkit.train.student import Student
    from tests.common.tiny import tiny_model

    checkpoint = saved.run("whole") / "checkpoint-2"
    deeper, wider = tiny_model(layers=3), tiny_model(hidden=64)
    for model, said in ((deeper, "holds no model.layers.2"), (wider, "has the shape")):
        with pytest.raises(UserError, match=said):
            shards.load_student(checkpoint, Student(model, Optim(), 1e-3, 1))


# ------------------------------------------------------------------------- with several processes


@pytest.mark.ranks
def test_two_one_three_two(shop: Shop, tmp_path: Path) -> None:
    """A run handed on from two processes to one, three and two is that of two to rounding; with two
    all the way it is that of one that never stopped, bit for bit.
    """
    here = values(shop, tmp_path)["whole"]

    def case(name: str, steps: int, resume: bool = False) -> dict[str, Any]:
        return {
            "values": {**here, "output": str(tmp_path / name), "steps": steps},
            "resume": resume,
        }

    status, said = saving.on(2, [case("never", 4), case("two", 1), case("on", 1)], tmp_path)
    assert status == 0, said[:4000]
    done(case("on", 2, resume=True))
    assert saving.on(3, [case("on", 3, resume=True)], tmp_path)[0] == 0
    assert saving.on(2, [case("on", 4, True), case("two", 4, True)], tmp_path)[0] == 0
    assert apart(tmp_path / "never" / "model", tmp_path / "two" / "model") == 0
    assert apart(tmp_path / "never" / "model", tmp_path / "on" / "model") < 1e-6
    for checkpoint, count in (("checkpoint-1", 2), ("checkpoint-3", 3), ("checkpoint-4", 2)):
        assert len(list((tmp_path / "on" / checkpoint / "shards").glob("*.distcp"))) == count
    assert not (tmp_path / "on" / "checkpoint-2" / "shards").exists(), "one process wrote it"


@pytest.mark.ranks
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_while_it_writes(shop: Shop, tmp_path: Path, rank: int) -> None:
    """The checkpoint before is whole, and the run goes on from it."""
    here = {**values(shop, tmp_path)["tied"], "steps": 3}
    status, _ = saving.on(2, [{"values": here, "slow": 1.0, "kill": rank}], tmp_path)
    run = tmp_path / "tied"
    assert status != 0 and not (run / "checkpoint-2").exists()
    assert (run / ".partial-checkpoint-2").exists(), "it was under way"
    done({"values": here, "resume": True})
    never = {**here, "output": str(tmp_path / "never")}
    done({"values": never})
    assert apart(run / "model", tmp_path / "never" / "model") < 1e-9
    assert not list(run.glob(".partial*"))


@pytest.mark.ranks
@pytest.mark.parametrize("what", ["a shard is damaged", "a process cannot write"])
def test_all_end_with_one_message(shop: Shop, tmp_path: Path, what: str) -> None:
    """Found by one of them, said once."""
    here = values(shop, tmp_path)["tied"]
    run = tmp_path / "tied"
    if what == "a shard is damaged":
        assert saving.on(2, [{"values": here}], tmp_path)[0] == 0
        shard = run / "checkpoint-2" / "shards" / "__1_0.distcp"
        shard.write_bytes(shard.read_bytes()[:-1])
        expected = "checkpoint-2 is damaged: shards/__1_0.distcp has"
        status, said = saving.on(2, [{"values": here, "resume": True}], tmp_path)
    else:
        expected = "checkpoint-1 could not be written (OSError: process 1: OSError: no space left)"
        status, said = saving.on(2, [{"values": here, "full": 1}], tmp_path)
        assert not list(run.glob("checkpoint-*")) and not list(run.glob(".partial*"))
    told = [line for line in said.splitlines() if "UserError: " in line and str(run) in line]
    assert status != 0 and len(told) == 1 and expected in told[0], said[:4000]
