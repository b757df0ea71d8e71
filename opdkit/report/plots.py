"""Which metrics share a chart, in which section, and what a chart means."""

from __future__ import annotations

from dataclasses import dataclass

WAITED = "Who waited for whom"  # a section


@dataclass(frozen=True)
class Plot:
    """A chart of the metrics in `keys`; `prefix/*` takes all that begin so."""

    section: str
    title: str
    keys: tuple[str, ...]
    unit: str = ""
    about: str = ""
    smooth: bool = True


PLOTS = (
    Plot(
        "Learning",
        "KL to the teacher",
        ("teacher_kl/*",),
        "nats per token",
        "Sampled estimate of KL(student ‖ teacher). At 0 the student writes exactly as the teacher "
        "would.",
    ),
    Plot("Learning", "Loss", ("loss",), "", "What is minimised: the sum of the objective's terms."),
    Plot(
        "Learning",
        "Entropy",
        ("entropy/*",),
        "nats per token",
        "How open the model's choices are. A collapse towards 0 means that it stops exploring.",
    ),
    Plot(
        "Learning",
        "Reward",
        ("reward/mean", "reward/std"),
        "",
        "Mean over the step's rollouts, and one standard deviation around it.",
    ),
    Plot(
        "Learning",
        "Rewards by name",
        ("rewards/*",),
        "",
        "Each of several, a mean over the step's rollouts that it applies to.",
    ),
    Plot(
        "Learning",
        "Correct answers",
        ("correct/*",),
        "%",
        "Share of the training rollouts with a right answer.",
    ),
    Plot(
        "Learning",
        "Worth of pairs",
        ("pairs/chosen", "pairs/rejected", "pairs/margin"),
        "",
        "What the preferred and the other answer are worth to the loss, and by how much.",
    ),
    Plot(
        "Learning",
        "Pairs in order",
        ("pairs/accuracy",),
        "%",
        "Share of pairs whose preferred answer is worth more.",
    ),
    Plot(
        "Learning",
        "Beside the student",
        ("beside/*",),
        "",
        "What a method keeps beside the student and moves with it, such as a controller.",
    ),
    Plot("Learning", "Gradient norm", ("grad_norm",), "", "Before clipping."),
    Plot("Learning", "Learning rate", ("learning_rate",), smooth=False),
    Plot(
        "Tokens",
        "log(teacher / student)",
        ("log_ratio/*",),
        "nats",
        "At the sampled tokens: what OPD credits them with. A long negative tail are tokens that "
        "the teacher would hardly write.",
    ),
    Plot(
        "Tokens",
        "Trusted tokens",
        ("trust/*",),
        "%",
        "Mean of min(teacher / student, 1): how many of the student's tokens speculative sampling "
        "would accept from it.",
    ),
    Plot(
        "Tokens",
        "Sure or not, agreed or not",
        ("quadrants/*",),
        "%",
        "Tokens by student entropy (from 0.5 nats: unsure) and KL to the teacher (from 0.1 nats: "
        "apart). Sure and apart: confident mistakes.",
    ),
    Plot(
        "Tokens",
        "Mass on the top k",
        ("mass/*",),
        "%",
        "Probability that a model gives to its own top k or to the other's.",
    ),
    Plot(
        "Tokens",
        "Overlap of the top k",
        ("overlap/*",),
        "%",
        "Share of the student's top k that is in the teacher's.",
    ),
    Plot("Terms", "Loss per term", ("loss/*",)),
    Plot(
        "Terms",
        "Mean weight per term",
        ("weight/*",),
        "",
        "Mean over the tokens that the term selects.",
    ),
    Plot(
        "Terms",
        "Tokens per term",
        ("share/*",),
        "%",
        "Share of the trained tokens that the term selects.",
    ),
    Plot(
        "Terms",
        "Effective tokens per term",
        ("effective_tokens/*",),
        "tokens",
        "(sum of weights)² / sum of squares: as many equally weighted tokens would average as "
        "well.",
    ),
    Plot(
        "Terms",
        "Gradient per term",
        ("term_gradient/*",),
        "",
        "Norm of each term's gradient in the student's logits, over the step.",
    ),
    Plot(
        "Completions",
        "Length",
        ("completions/mean_length", "completions/min_length", "completions/max_length"),
        "tokens",
        "Mean, and the shortest and longest of the step.",
    ),
    Plot(
        "Completions",
        "Cut at the limit",
        ("completions/truncated_fraction",),
        "%",
        "Share of rollouts that reached max_completion_length. Runaway lengths show here first.",
    ),
    Plot("Completions", "Tokens trained", ("tokens/trained",), "tokens per step"),
    Plot("Completions", "Tokens by domain", ("tokens_by_domain/*",), "tokens per step"),
    Plot(
        "Completions",
        "Dropped over a budget",
        ("dropped_by_domain/*",),
        "rollouts per step",
        "By domain, so that no more tokens are scored and learnt from than were asked for.",
    ),
    Plot(
        "Episodes",
        "Turns",
        ("turns/*",),
        "turns",
        "Of an episode: mean, and the fewest and most of the step.",
    ),
    Plot(
        "Curriculum",
        "Cut at",
        ("curriculum/length",),
        "tokens",
        "Where the curriculum cuts responses: its rung of the ladder.",
        smooth=False,
    ),
    Plot(
        "Curriculum",
        "Entropy at the last gate",
        ("curriculum/entropy", "curriculum/min_entropy"),
        "nats per token",
        "Of held-out samples, and what it must be at least for responses to grow.",
        smooth=False,
    ),
    Plot(
        "Curriculum",
        "Rung",
        ("curriculum/rung", "curriculum/stable_rung", "curriculum/frozen"),
        "",
        "Of the ladder, counted from 0: now, and the last whose gate passed. Frozen is 1 once a "
        "gate has failed.",
        smooth=False,
    ),
    Plot(
        "Curriculum",
        "Pass rates",
        (
            "curriculum/mean_pass_rate",
            "curriculum/mean_smoothed_pass_rate",
            "curriculum/asked_smoothed_pass_rate",
            "curriculum/always_solved",
            "curriculum/never_solved",
        ),
        "%",
        "How often the student solves its prompts: the mean over all that were ever asked, over "
        "those that this step asked, and the shares always and never solved.",
    ),
    Plot(
        "Curriculum",
        "Prompts ever asked",
        ("curriculum/prompts_ever_asked",),
        "prompts",
        smooth=False,
    ),
    Plot(
        "Curriculum",
        "Written for the student",
        ("curriculum/prefix_share",),
        "%",
        "Share of a reference response that opens a guided rollout.",
        smooth=False,
    ),
    Plot(
        "Curriculum",
        "Replay",
        ("curriculum/phi", "curriculum/fresh"),
        "%",
        "phi: the share of batches with the student's own text, new or stored; fresh: of those "
        "that it writes anew.",
        smooth=False,
    ),
    Plot(
        "Curriculum",
        "Responses stored",
        ("curriculum/stored",),
        "responses",
        smooth=False,
    ),
    Plot(
        "Curriculum",
        "Weights of rewards",
        ("curriculum/weight_*",),
        "",
        "What each of several rewards counts.",
        smooth=False,
    ),
    Plot(
        "Curriculum",
        "Learnt and rehearsed",
        ("curriculum/prompts_to_learn", "curriculum/rehearsal_pool"),
        "",
        "Prompts that are asked, and stored answers to those that were mastered at the start.",
        smooth=False,
    ),
    Plot(
        "Curriculum",
        "Groups to replay",
        ("curriculum/groups_to_replay",),
        "groups",
        "Of the last steps, from which some are had again.",
        smooth=False,
    ),
    Plot(
        "Curriculum",
        "Depth",
        ("curriculum/depth",),
        "turns",
        "Of an episode, how many turns are the student's.",
        smooth=False,
    ),
    Plot(
        WAITED,
        "Lag",
        ("lag/*",),
        "",
        "How many steps, and how many optimiser updates, the student has moved on since the oldest "
        "tokens it learns from were written.",
        smooth=False,
    ),
    Plot(
        WAITED,
        "Rollouts by sampler",
        ("sampler/rollouts/*",),
        "per step",
        "One that writes much less than the others is slow, or was away.",
    ),
    Plot(
        WAITED,
        "Scored as they ended",
        ("early/*",),
        "rollouts per step",
        "While others were still being written; failed: the step that reads it ends so.",
    ),
    Plot(
        WAITED,
        "Samplers",
        ("sampler/servers", "sampler/there", "sampler/lost"),
        "",
        "Those that took part in the step; lost: that were away so far, and are asked again.",
        smooth=False,
    ),
    Plot(
        WAITED,
        "Started again",
        ("cluster/*",),
        "times",
        "The trainers, from their newest checkpoint.",
        smooth=False,
    ),
    Plot(
        "Speed and memory",
        "Throughput",
        ("tokens_per_second/*",),
        "tokens/s",
        "Of each phase, and of the whole step.",
    ),
    Plot(
        "Speed and memory",
        "Utilisation",
        ("mfu/*",),
        "share",
        "Model FLOPs over the device's peak; of a CPU the peak is a rule of thumb.",
    ),
    Plot("Speed and memory", "Time", ("seconds/*",), "s", "Of each phase, and of the whole step."),
    Plot("Speed and memory", "Peak memory", ("memory/peak_gib",), "GiB", smooth=False),
)


@dataclass(frozen=True)
class Profile:
    """A chart of metrics that are one quantity at several places, the names of which end with a
    number: along these, early, midway and late in the run.
    """

    section: str
    title: str
    prefix: str
    unit: str
    about: str
    along: str


PROFILES = (
    Profile(
        "Tokens",
        "Distance by position",
        "drift/tenth_",
        "nats",
        "Mean |log(teacher / student)| in each tenth of the responses. Rising: the student drifts "
        "away in their course.",
        "tenth",
    ),
    Profile(
        "Episodes",
        "KL by turn",
        "kl_by_turn/",
        "nats per token",
        "Sampled estimate of KL(student ‖ teacher) on the student's tokens of each turn. Rising: "
        "what goes wrong early is made worse later.",
        "turn",
    ),
    Profile(
        "Episodes",
        "Tokens by turn",
        "tokens_by_turn/",
        "tokens per step",
        "The student's, in each turn: few make its KL uncertain.",
        "turn",
    ),
)
