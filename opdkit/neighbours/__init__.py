"""What papers around on-policy distillation propose outside token rollouts: control tasks, small
flows. One file each, with an experiment of its own; they share mathematics with the rest, no loop.

Each name stands for a module with

    CLAIM     what the paper says, in one sentence
    SOURCE    the paper: "arXiv:2311.08290"
    NEEDS     packages besides torch that its experiment imports
    Settings  what can be chosen: a frozen dataclass upon `experiment.Experiment`, all with defaults
    run(settings, progress) -> Outcome   the experiment; `progress` is that of base/progress.py

Its mathematics is plain functions over tensors; what needs a library of its field imports it inside
`run`.
"""

NEIGHBOURS: dict[str, str] = {
    "doc": "opdkit.neighbours.doc",
    "trirl": "opdkit.neighbours.trirl",
    "flow_dppo": "opdkit.neighbours.flow_dppo",
    "f_distill": "opdkit.neighbours.f_distill",
    "props": "opdkit.neighbours.props",
    "hnpg": "opdkit.neighbours.hnpg",
}
