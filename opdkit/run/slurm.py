"""A run as a batch job of SLURM: a script that starts one process for each GPU of each node, has
the run saved before the time is up, and goes on with it in the job's next turn.
"""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from opdkit.base.errors import UserError
from opdkit.base.files import exists, read_text, write_whole
from opdkit.run.folder import own
from opdkit.run.plan.devices import Device, cpu
from opdkit.run.plan.estimate import checked
from opdkit.run.refuse import refuse
from opdkit.run.resolve import resolve
from opdkit.run.settings import Run

MARK = "# Written by `opdkit slurm`."
TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")  # minutes, h:m:s, days-hours ...
NAME = re.compile(r"[\w.,@+:/-]+")  # of partitions and accounts


@dataclass(frozen=True)
class Job:
    """What is asked of SLURM, and what is started there."""

    command: tuple[str, ...]  # of `opdkit train`: a file or a recipe, and settings
    nodes: int = 1
    gpus: int = 8  # of a node; as many processes
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    grace: int = 120  # seconds before the end in which the run is saved
    resume: bool = False  # goes on with an earlier run from its first turn
    more: tuple[str, ...] = ()  # further options of sbatch

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"--{name} {getattr(self, name)}: it is a number of {name}, 1 or more"
                )
        if not TIME.fullmatch(self.time):
            raise UserError(
                f"--time {self.time} is no time of SLURM's: give minutes, hours:minutes:seconds or "
                "days-hours, such as 24:00:00"
            )
        for name in ("partition", "account"):
            value = getattr(self, name)
            if value is not None and not NAME.fullmatch(value):
                raise UserError(f"--{name} {value!r} cannot be the name of one")
        for text in self.more:
            if not re.fullmatch(r"-\S*[^\n]*", text):
                raise UserError(
                    f"--sbatch {text!r} is no option of sbatch: write it as there, such as "
                    "--sbatch=--mem=0"
                )
        least = seconds_of(self.time)
        if not 20 <= self.grace < least:
            raise UserError(
                f"--grace {self.grace}: so many seconds before the end of {self.time} the run is "
                "told to save itself. Give 20 or more, and less than there are: a step's time and "
                "that of writing a checkpoint"
            )


def seconds_of(time: str) -> int:
    """Of a time as SLURM takes it."""
    days, dash, rest = time.rpartition("-")
    words = [int(word) for word in rest.split(":")]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = [*words, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(words) == 3:
        return (words[0] * 60 + words[1]) * 60 + words[2]
    return words[0] * 60 + (words[1] if len(words) == 2 else 0)  # minutes[:seconds]


def write_script(run: Run, job: Job, path: Path | None = None) -> Path:
    """The job's script, once all has been refused that can be without a model; NAME.sbatch, where
    no path is given, as the run's folder is called.
    """
    if run.cluster is not None:
        raise UserError(
            "the run's cluster places its processes itself, and the job would start one in each of "
            "its own: leave cluster out, or start Ray on the job's machines and submit it there"
        )
    device = cpu() if run.device == "cpu" else Device("GPU", 0, 0, 0, 0)
    known, method, reward, notes = checked(run, device)
    refuse(known, method, reward)
    for note in notes:
        print(f"opdkit: {note}", file=sys.stderr)
    folder = resolve(replace(run, device="cpu"), job.resume).folder  # no GPU has to be here
    if not job.resume and any(p.name != "run.yaml" for p in own(folder)):
        raise UserError(
            f"{folder} already holds a run: go on with it (opdkit slurm --resume), or choose "
            "another output=DIR"
        )
    path = Path(f"{folder.name}.sbatch") if path is None else path
    if exists(path) and MARK not in read_text(path, "the script"):
        raise UserError(
            f"{path} is there, and `opdkit slurm` has not written it: choose another --output"
        )
    logs = folder.parent / f"{folder.name}-logs"
    logs.mkdir(parents=True, exist_ok=True)  # SLURM does not make it
    write_whole(path, script(run, job, folder, logs))
    return path


def script(run: Run, job: Job, folder: Path, logs: Path) -> str:
    """The text of the job's script, for a run whose folder is known."""
    return "\n".join([*_asked(run, job, folder, logs), "", *_done(job, folder, logs)]) + "\n"


def _asked(run: Run, job: Job, folder: Path, logs: Path) -> list[str]:
    name = re.sub(r"[^\w.-]+", "-", folder.name)
    options = [
        f"--job-name={name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={job.gpus}"] if run.device != "cpu" else []),
        f"--time={job.time}",
        *([f"--partition={job.partition}"] if job.partition else []),
        *([f"--account={job.account}"] if job.account else []),
        f"--signal=B:USR1@{job.grace}",
        "--requeue",
        "--open-mode=append",
        f"--output={_quoted(logs)}/job-%j.log",
        f"--chdir={_quoted(Path.cwd())}",
        *job.more,
    ]
    return [
        "#!/bin/bash",
        f"{MARK} Submit it with sbatch; change what you like.",
        *(f"#SBATCH {option}" for option in options),
    ]


def _quoted(path: Path) -> str:
    """As sbatch reads it in its script."""
    text = str(path)
    return f'"{text}"' if re.search(r"\s", text) else text


BODY = """\
set -u
# seconds that torchrun leaves its processes to save the run, once they are told to end
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={wait}

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 20000))
turn=${{SLURM_RESTART_COUNT:-0}}
resume=({resume})
if [ "$turn" -gt 0 ]; then
    resume=(--resume)
fi

# The end of the time (USR1) and a cancelled job (TERM) are handed on to the processes, which save
# the run. scancel reaches all of them; srun would end them at once, were it told.
stopped=
end() {{
    stopped=$1
    scancel --signal=TERM "$SLURM_JOB_ID"
}}
trap 'end time' USR1
trap 'end cancelled' TERM

# where one node fails the others end by themselves; --wait ends what does not
srun --nodes={nodes} --ntasks-per-node=1 --kill-on-bad-exit=0 --wait={grace} \\
    --open-mode=append --output={log} \\
    {python} -m torch.distributed.run \\
    --nnodes {nodes} --nproc-per-node {gpus} \\
    --rdzv-backend c10d --rdzv-endpoint "${{hosts[0]}}:$port" --rdzv-id "$SLURM_JOB_ID-$turn" \\
    -m opdkit train {command} ${{resume[@]+"${{resume[@]}}"}} &
step=$!
while :; do
    wait "$step"
    status=$?
    kill -0 "$step" 2> /dev/null || break  # a signal ends `wait`, and not the step
done

if [ "$stopped" = time ] && [ "$status" -ne 0 ]; then
    echo "the time is up: the run is saved, and goes on in the job's next turn"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def _done(job: Job, folder: Path, logs: Path) -> list[str]:
    command = [*job.command, f"output={folder}"]
    return BODY.format(
        wait=job.grace - 10,
        resume="--resume" if job.resume else "",
        nodes=job.nodes,
        gpus=job.gpus,
        grace=job.grace,
        log=f"{shlex.quote(str(logs))}/job-%j-node%n.log",
        python=shlex.quote(sys.executable),
        command=shlex.join(command),
    ).splitlines()
