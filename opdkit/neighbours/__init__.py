"""What papers around on-policy distillation propose outside token rollouts: control tasks, small
flows. One file each, with an experiment of its own; they share mathematics with the rest, no loop.

Each name stands for a module with `Settings`, a frozen dataclass of what can be chosen, and
`run(settings, progress) -> Outcome`, which does the experiment. Its mathematics is plain functions
over tensors; what needs a library of its field imports it inside `run`.
"""

NEIGHBOURS: dict[str, str] = {}
