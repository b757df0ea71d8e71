"""What a cluster is told before anything is started, and how weights and teachers go between
processes: without Ray.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import opdkit
from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.models.layout import Layout
from opdkit.objective.facts import EntropyFact, LogpAtFact, LogpFact, TopFact
from opdkit.run.cluster.actors import unplaced
from opdkit.run.cluster.driver import _Folder, bundles
from opdkit.run.cluster.sampler import as_array, as_tensor
from opdkit.run.cluster.settings import RayCluster, cluster_of
from opdkit.run.cluster.teacher import HostedNumbers, HostedStates, Seat, TeacherActor, Teachers
from opdkit.run.cluster.trainer import Parts, Task
from opdkit.run.folder import FORMER, RUN
from opdkit.run.open import Given, Models
from opdkit.run.settings import make_run
from opdkit.teachers.base import answers
from opdkit.teachers.local import LocalTeacher
from opdkit.teachers.pool import Gone
from opdkit.types import Rollout
from tests.end_to_end.conftest import Shop
from tests.end_to_end.conftest import shop as shop

ROOT = Path(opdkit.__file__).parent

# ----------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("ray", RayCluster()),
        ("ray:auto", RayCluster(address="auto")),
        ({"kind": "ray", "trainers": 2}, RayCluster(trainers=2)),
    ],
)
def test_a_cluster_is_text_or_a_group(said: Any, meant: RayCluster) -> None:
    assert cluster_of(said) == meant


def test_a_setting_of_it_is_given_by_its_name() -> None:
    values = {"student": "s", "data": "d", "cluster": "ray"}
    run = make_run(values, ["cluster.trainers=2", "cluster.address=auto"])
    assert run.placement == RayCluster(trainers=2, address="auto")
    assert run.writes_elsewhere and not make_run({"student": "s", "data": "d"}).writes_elsewhere


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("slurm", "no kind of cluster"),
        ({"kind": "ray", "trainers": 0}, "trainers=0 must be at least 1"),
        ({"kind": "ray", "parts": 0}, "parts=0 must be at least 1"),
        ({"kind": "ray", "trainer": 1}, "trainers"),
        (3, "cluster"),
    ],
)
def test_a_wrong_cluster_is_refused_with_the_run(said: Any, why: str) -> None:
    with pytest.raises(UserError, match=why):
        make_run({"student": "s", "data": "d", "cluster": said})


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_run_says_what_to_install(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shop.train(tmp_path / "run", "cluster=ray") == 2
    said = capsys.readouterr().err
    assert "pip install 'opdkit[ray]'" in said and "--nproc" in said
    assert not (tmp_path / "run").exists()


def test_one_file_knows_ray() -> None:
    knowing = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if re.search(r"^\s*(import|from) ray\b", path.read_text(), re.M)
    }
    assert knowing == {"run/cluster/actors.py"}


# --------------------------------------------------------------------------------------------- room


def test_a_part_needs_its_room_on_one_machine() -> None:
    """Three GPUs on two machines: two parts of two GPUs do not fit, though one does."""
    gpu = {"CPU": 1.0, "GPU": 1.0}
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}]
    assert unplaced({"a": gpu, "b": gpu, "c": gpu}, nodes) == []
    assert unplaced({"a": gpu, "b": gpu, "c": gpu, "d": gpu}, nodes) == ["d"]
    two = {"CPU": 1.0, "GPU": 2.0}
    assert unplaced({"a": two, "b": two}, nodes) == ["b"]
    assert unplaced({"a": {"CPU": 1.0}}, []) == ["a"]


def test_a_server_samples_without_the_clusters_samplers(shop: Shop, tmp_path: Path) -> None:
    settings = RayCluster(trainers=2, samplers=3, teachers=1)
    run = shop.run(tmp_path)
    assert list(bundles(run, settings, False)) == [
        *("trainer-0", "trainer-1", "sampler-0", "sampler-1", "sampler-2", "teacher-0")
    ]
    assert {b["GPU"] for b in bundles(run, settings, True).values()} == {1.0}
    served = replace(run, sampler="server:http://127.0.0.1:1")
    assert list(bundles(served, settings, False)) == ["trainer-0", "trainer-1", "teacher-0"]


def test_a_run_goes_on_only_where_it_has_begun(shop: Shop, tmp_path: Path) -> None:
    """Trainers that died before the first step begin again, also where an earlier run is set
    aside: it is not that one that goes on.
    """
    run = shop.run(tmp_path / "run")
    folder = run.folder
    folder.mkdir()
    (folder / RUN).write_text("an earlier run")
    os.utime(folder / RUN, ns=(1, 1))
    anew = _Folder(run, resume=False, overwrite=True, allow_changes=False)
    assert anew.flags() == {"resume": False, "overwrite": True, "allow_changes": False}
    (folder / RUN).write_text("this one")  # its earlier one has been set aside
    (folder / FORMER).mkdir()
    assert anew.flags()["overwrite"]
    (folder / FORMER).rmdir()  # its first step is done
    assert anew.flags() == {"resume": True, "overwrite": False, "allow_changes": False}
    assert _Folder(run, True, False, True).flags()["resume"]


# ------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(), (2, 3), (4,)])
def test_weights_arrive_as_they_were(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, dtype=torch.float64).mul(9).to(dtype)
    array = as_array(values)
    was = values.clone()
    values.add_(1)  # the student moves on before they are sent
    there = as_tensor(array)
    assert there.dtype == dtype and there.shape == shape and torch.equal(there, was)


def test_weights_of_a_transposed_matrix_keep_their_order() -> None:
    values = torch.arange(6.0).view(2, 3).T
    assert torch.equal(as_tensor(as_array(values)), values)


# ----------------------------------------------------------------------------------------- teachers


class Here:
    """An actor that is an object of this process; it is gone `gone` times."""

    def __init__(self, actor: Any, gone: int = 0):
        self.actor, self.gone, self.calls = actor, gone, 0

    def __call__(self, method: str, *arguments: Any) -> Any:
        self.calls += 1
        if self.gone:
            self.gone -= 1
            raise Gone("it is started again")
        return getattr(self.actor, method)(*arguments)


ROLLOUTS = [
    Rollout(f"{i}", [5, 6, 7 + i], [8, 9, 10, 11][: 2 + i], [True] * (2 + i), [], [], "g")
    for i in range(3)
]


def hosted(shop: Shop, method: str, actor: Here) -> tuple[Any, Any, Any]:
    """A teacher that an actor holds, the same teacher here, and what opens both."""
    run = shop.run("unused", method=method, dtype="float64")
    models = Models(run, load(method), "cpu", Given(), shop_tokenizer(shop))
    teacher = LocalTeacher(shop.teacher)
    teachers = Teachers([[actor]], 5.0)  # type: ignore[list-item]
    there = replace(models.context, hosts=teachers.hosted)
    return teacher.open(there), teacher.open(models.context), teachers


def shop_tokenizer(shop: Shop) -> Any:
    from opdkit.models.load import load_tokenizer

    return load_tokenizer(shop.student)


@pytest.fixture(scope="module")
def actor(shop: Shop) -> TeacherActor:
    return TeacherActor(shop.run("unused", dtype="float64"))


def test_hidden_states_from_there_are_those_of_here(shop: Shop, actor: TeacherActor) -> None:
    """To the bit, in float64, at any of the positions."""
    there, here, _ = hosted(shop, "gkd", Here(actor))
    assert isinstance(there, HostedStates)
    layout, at = Layout(ROLLOUTS, 4), torch.tensor([9, 0, 5, 1])
    a, b = there.cut(300).source(layout, at), here.cut(300).source(layout, at)
    assert a.hidden.dtype == torch.float64
    assert torch.equal(a.logits(at), b.logits(at))
    nothing = torch.zeros(0, dtype=torch.int64)
    assert len(there.source(layout, nothing).hidden) == 0


def test_numbers_from_there_are_those_of_here(shop: Shop, actor: TeacherActor) -> None:
    """Log-probs, entropies, top tokens and log-probs at another's top tokens."""
    there, here, _ = hosted(shop, "opd", Here(actor))
    assert isinstance(there, HostedNumbers)
    layout, at = Layout(ROLLOUTS, 4), torch.tensor([9, 0, 5, 1])
    top = {TopFact("student", 3): torch.tensor([[4, 5, 6]] * 4)}
    wanted = [LogpFact("teacher"), EntropyFact("teacher"), TopFact("teacher", 3)]
    wanted += [LogpAtFact("teacher", "teacher", 3), LogpAtFact("teacher", "student", 3)]
    a = there.facts(wanted, layout, at, top)
    b = answers(here, wanted, layout, at, top)
    for fact in wanted:
        assert torch.equal(a[fact], b[fact].to(a[fact].dtype)), fact.words()
    empty = there.facts(wanted, layout, at[:0], {})
    assert empty[TopFact("teacher", 3)].shape == (0, 3)


def test_spans_of_text_are_read_of_a_teacher_here(shop: Shop, actor: TeacherActor) -> None:
    teachers = Teachers([[Here(actor)]], 5.0)  # type: ignore[list-item]
    run = shop.run("unused", method="gold", teacher=shop.llama)
    context = Models(run, load("gold"), "cpu", Given(), shop_tokenizer(shop)).context
    assert teachers.hosted(LocalTeacher(shop.llama), context) is None


def test_the_spare_takes_over_and_changes_nothing(shop: Shop, actor: TeacherActor) -> None:
    there, here, teachers = hosted(shop, "gkd", Here(actor))
    dying, spare = Here(actor, gone=1), Here(TeacherActor(shop.run("unused", dtype="float64")))
    place = teachers.seats[0]
    place.actors[:] = [dying, spare]  # as it was opened, the teacher was held
    layout, at = Layout(ROLLOUTS, 4), torch.tensor([9, 0, 5, 1])
    assert torch.equal(there.source(layout, at).logits(at), here.source(layout, at).logits(at))
    assert spare.calls > 0 and teachers.counts()["pool/replaced"] == 1
    assert teachers.seats[0].actors == [spare, dying]  # which is the spare once it is back


def test_a_place_without_a_spare_waits_for_its_return() -> None:
    class Alive:
        def alive(self) -> None:
            pass

    back = Here(Alive(), gone=2)
    assert Seat([back], {}).next(5.0).actors == [back] and back.calls == 3  # type: ignore
    with pytest.raises(Gone):
        Seat([Here(Alive(), gone=99)], {}).next(0.3)  # type: ignore[list-item]


def test_teachers_that_hold_nothing_are_told_once(
    shop: Shop, actor: TeacherActor, capsys: pytest.CaptureFixture[str]
) -> None:
    """A teacher that is evaluated writes in the trainer, so that none is held elsewhere."""
    run = shop.run("unused", evaluate={"data": shop.data, "teacher": True})
    task = Task(
        run, RayCluster(teachers=1), 1, "", 0, None, [[Here(actor)]], False, 0, *[False] * 3
    )  # type: ignore[list-item, arg-type]
    parts = Parts(task, 0)
    assert parts.given().hosts is None
    parts.counts()
    assert "cluster.teachers=1, and none of them holds anything" in capsys.readouterr().err
    parts.counts()
    assert capsys.readouterr().err == ""


def test_a_process_holds_one_teacher_at_a_time(shop: Shop) -> None:
    held = TeacherActor(shop.run("unused"))
    first, second = LocalTeacher(shop.teacher), LocalTeacher(shop.student)
    held.load(first)
    was = held.local
    held.load(first)
    assert held.local is was
    held.load(second)
    assert held.local is not was and held.spec == second
