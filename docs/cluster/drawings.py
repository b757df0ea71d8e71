"""The drawings of these pages: who holds what, and what flows. `python docs/cluster/drawings.py`
writes them anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

LINE = 17  # pixels from one line of text to the next
FILLS = {  # of each kind of thing: inside, and edge
    "trainer": ("#e8effd", "#2b66e3"),
    "sampler": ("#fdf1e3", "#c76f14"),
    "teacher": ("#e4f5f1", "#12957f"),
    "disk": ("#f1f0f4", "#6b6480"),
    "place": ("none", "#9aa3b2"),
}
STYLE = (
    "text{font:13px system-ui,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif;fill:#1b2230}"
    ".t{font-weight:650}.s{fill:#4b5565;font-size:12px}.f{fill:#3d4656;font-size:12px}"
    ".p{font-size:12px;fill:#5d6675;font-weight:600}"
    ".a{fill:none;stroke:#5d6675;stroke-width:1.6}"
)


@dataclass(frozen=True)
class Box:
    """A thing with a title and what it holds."""

    kind: str
    x: int
    y: int
    w: int
    h: int
    title: str
    lines: Sequence[str] = ()

    def __str__(self) -> str:
        fill, edge = FILLS[self.kind]
        dash = ' stroke-dasharray="5 4"' if self.kind == "place" else ""
        out = (
            f'<rect x="{self.x}" y="{self.y}" width="{self.w}" height="{self.h}" rx="8" '
            f'fill="{fill}" stroke="{edge}" stroke-width="1.4"{dash}/>'
        )
        name = "p" if self.kind == "place" else "t"
        out += (
            f'<text class="{name}" x="{self.x + 12}" y="{self.y + 21}">{escape(self.title)}</text>'
        )
        for i, line in enumerate(self.lines):
            at = self.y + 21 + LINE * (i + 1)
            out += f'<text class="s" x="{self.x + 12}" y="{at}">{escape(line)}</text>'
        return out


@dataclass(frozen=True)
class Flow:
    """An arrow through points, and what goes along it, written at a place."""

    points: Sequence[tuple[int, int]]
    label: str
    at: tuple[int, int]
    anchor: str = "middle"

    def __str__(self) -> str:
        path = "M" + "L".join(f"{x},{y}" for x, y in self.points)
        out = f'<path class="a" d="{path}" marker-end="url(#to)"/>'
        for i, line in enumerate(self.label.split("\n")):
            x, y = self.at[0], self.at[1] + 15 * i
            out += (
                f'<text class="f" x="{x}" y="{y}" text-anchor="{self.anchor}">{escape(line)}</text>'
            )
        return out


def svg(width: int, height: int, title: str, things: Sequence[Box | Flow]) -> str:
    """A drawing on white, readable on any page."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{escape(title)}">'
        f"<style>{STYLE}</style>"
        '<defs><marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto-start-reverse"><path d="M0,0L8,4L0,8z" fill="#5d6675"/>'
        "</marker></defs>"
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    )
    return head + "\n" + "\n".join(map(str, things)) + "\n</svg>\n"


def one_gpu() -> str:
    return svg(
        860,
        330,
        "One process on one GPU: the student writes, the teacher scores, the student learns",
        [
            Box("place", 10, 10, 560, 310, "the GPU, one process"),
            Box(
                "trainer",
                30,
                44,
                240,
                126,
                "student",
                (
                    "weights, float32: 4 bytes each",
                    "gradients 4, AdamW 8",
                    "activations of one micro-batch",
                    "one chunk of the vocabulary",
                ),
            ),
            Box(
                "sampler",
                30,
                224,
                240,
                76,
                "sampler: the student itself",
                ("key-value cache, in half of", "what is free"),
            ),
            Box(
                "teacher",
                350,
                44,
                200,
                92,
                "teacher",
                ("weights, bfloat16: 2 bytes", "(fewer bits, or away while", "it does not score)"),
            ),
            Box(
                "place",
                600,
                44,
                250,
                92,
                "processes on the CPU",
                ("rewards: maths, code in a sandbox,", "environments"),
            ),
            Box(
                "disk",
                600,
                204,
                250,
                96,
                "run folder",
                ("metrics, timeline, samples", "checkpoints", "model/ and report.html"),
            ),
            Flow([(110, 170), (110, 222)], "same weights", (102, 200), "end"),
            Flow([(190, 222), (190, 172)], "rollouts", (198, 200), "start"),
            Flow([(272, 90), (348, 90)], "tokens", (310, 82)),
            Flow([(348, 118), (272, 118)], "numbers", (310, 134)),
            Flow(
                [(272, 250), (440, 250), (440, 170), (700, 170), (700, 138)],
                "responses to score",
                (560, 162),
            ),
            Flow([(272, 280), (598, 280)], "a step's line, now and then a checkpoint", (436, 274)),
        ],
    )


def one_node() -> str:
    gpu = 129
    trainers = [
        Box(
            "trainer",
            26 + gpu * i,
            60,
            122,
            90,
            f"GPU {i}",
            (f"process {i}", "1/4 of student", "and AdamW"),
        )
        for i in range(4)
    ]
    return svg(
        880,
        420,
        "One node with 8 GPUs: four train one student, two sample, two hold teachers",
        [
            Box("place", 14, 26, 536, 140, "opdkit train RUN.yaml --nproc 4"),
            *trainers,
            Box(
                "sampler",
                30,
                262,
                150,
                90,
                "GPU 4, 5",
                ("vLLM servers", "a whole student", "key-value cache"),
            ),
            Box(
                "teacher",
                330,
                262,
                190,
                90,
                "GPU 6, 7",
                ("opdkit serve-teacher, or", "vLLM: a whole teacher", "each"),
            ),
            Box(
                "disk",
                610,
                60,
                250,
                90,
                "run folder, this machine's disk",
                (
                    "metrics, timeline, samples",
                    "checkpoints, written by all",
                    "model/ and report.html",
                ),
            ),
            Flow([(60, 152), (60, 260)], "weights after\na step (1)", (66, 200), "start"),
            Flow([(150, 260), (150, 152)], "rollouts", (158, 236), "start"),
            Flow([(380, 152), (380, 260)], "tokens", (372, 200), "end"),
            Flow(
                [(460, 260), (460, 152)], "log-probs, top k\nor hidden states", (468, 205), "start"
            ),
            Flow([(550, 105), (608, 105)], "", (0, 0)),
            Flow(
                [(180, 380), (60, 380), (60, 356)],
                "(1) process 0 sends what all have put together; "
                "with ahead=1 the servers write while the four learn",
                (190, 384),
                "start",
            ),
        ],
    )


def several_nodes() -> str:
    def node(x: int, number: str, ranks: str) -> list[Box]:
        return [
            Box("place", x, 40, 250, 190, f"node {number}: torchrun"),
            Box(
                "trainer",
                x + 16,
                74,
                218,
                72,
                "8 processes, one per GPU",
                (ranks, "each: its part of the student"),
            ),
            Box(
                "teacher",
                x + 16,
                158,
                218,
                56,
                "teachers, on each of them",
                ("whole, or spread over them",),
            ),
        ]

    return svg(
        900,
        400,
        "Several nodes: one torchrun per node, one process per GPU, one student over all of them",
        [
            *node(20, "0", "ranks 0 to 7"),
            *node(326, "1", "ranks 8 to 15"),
            *node(632, "N-1", "the last 8 ranks"),
            Flow([(272, 110), (324, 110)], "", (0, 0)),
            Flow([(324, 126), (272, 126)], "", (0, 0)),
            Flow([(578, 110), (630, 110)], "", (0, 0)),
            Flow([(630, 126), (578, 126)], "", (0, 0)),
            Box(
                "place",
                20,
                0,
                862,
                32,
                "between them: parts of layers and gradients, numbers per token, small objects",
            ),
            Box(
                "disk",
                200,
                300,
                500,
                76,
                "a file system that all nodes see",
                (
                    "run folder: every process writes its part of a checkpoint,",
                    "process 0 all else and the name that makes it complete",
                ),
            ),
            Flow(
                [(145, 232), (145, 338), (198, 338)],
                "rank 0: metrics,\nsamples, model/",
                (138, 270),
                "end",
            ),
            Flow([(451, 232), (451, 298)], "its parts of a checkpoint", (459, 270), "start"),
            Flow([(757, 232), (757, 338), (702, 338)], "its parts", (765, 300), "start"),
        ],
    )


def ray() -> str:
    return svg(
        900,
        420,
        "Ray: a driver, and in one placement group trainers, samplers and teachers",
        [
            Box(
                "disk",
                14,
                40,
                190,
                110,
                "driver",
                ("opdkit train R.yaml", "cluster=ray", "places, watches,", "starts again"),
            ),
            Box("place", 240, 16, 646, 300, "one placement group: all of it, or nothing starts"),
            Box(
                "trainer",
                262,
                52,
                330,
                76,
                "trainers: actors with RANK, WORLD_SIZE",
                ("the same loop as under torchrun", "each 1/n of the student and of AdamW"),
            ),
            Box(
                "sampler",
                262,
                222,
                240,
                76,
                "samplers",
                ("each a whole student of its own", "hf or vLLM"),
            ),
            Box(
                "teacher",
                646,
                222,
                220,
                76,
                "teachers",
                ("each holds one teacher", "or takes turns among many"),
            ),
            Box(
                "disk",
                646,
                52,
                220,
                76,
                "run folder",
                ("seen by every node", "metrics, checkpoints, model/"),
            ),
            Flow([(206, 90), (238, 90)], "", (0, 0)),
            Flow([(300, 130), (300, 220)], "weights, by version", (308, 186), "start"),
            Flow([(440, 220), (440, 130)], "rollouts", (448, 166), "start"),
            Flow([(560, 130), (690, 220)], "tokens", (606, 182), "end"),
            Flow([(740, 220), (594, 118)], "log-probs,\nhidden states", (700, 168), "start"),
            Flow([(594, 76), (644, 76)], "", (0, 0)),
            Box(
                "place",
                240,
                340,
                646,
                64,
                "where one ends",
                (
                    "a sampler or teacher is started again, what it had under way is asked again;",
                    "a trainer ends all trainers, which start again from the newest checkpoint",
                ),
            ),
        ],
    )


DRAWINGS = {
    "one_gpu": one_gpu,
    "one_node": one_node,
    "slurm": several_nodes,
    "ray": ray,
}


def main() -> None:
    for name, draw in DRAWINGS.items():
        Path(__file__).with_name(f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
