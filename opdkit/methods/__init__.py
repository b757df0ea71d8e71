"""The built-in methods: one file per paper, in families.

Each name stands for a function that returns an Objective or a Method.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Methods that belong together: what they are called, what they have in common, and the
    function behind each name.
    """

    title: str
    about: str
    methods: dict[str, str]


FAMILIES: dict[str, Family] = {
    "standard": Family(
        "the standard forms",
        "The teacher's distribution, on text of the student, of the data, or stored.",
        {
            "opd": "opdkit.methods.opd:opd",
            "gkd": "opdkit.methods.gkd:gkd",
            "dagger": "opdkit.methods.dagger:dagger",
            "kl_mixing": "opdkit.methods.kl_mixing:kl_mixing",
            "topk_opd": "opdkit.methods.topk_opd:topk_opd",
            "minillm": "opdkit.methods.minillm:minillm",
            "distillm": "opdkit.methods.distillm:distillm",
            "lightning_opd": "opdkit.methods.lightning_opd:lightning_opd",
            "sft": "opdkit.methods.sft:sft",
            "eksft": "opdkit.methods.eksft:eksft",
        },
    ),
    "tokens": Family(
        "credits and weights of tokens",
        "Which tokens learn, how much, and what each is credited with.",
        {
            "gopd": "opdkit.methods.gopd:gopd",
            "exopd": "opdkit.methods.gopd:exopd",
            "tropd": "opdkit.methods.tropd:tropd",
            "iw_opd": "opdkit.methods.iw_opd:iw_opd",
            "position_opd": "opdkit.methods.position_opd:position_opd",
            "vopd": "opdkit.methods.vopd:vopd",
            "eopd": "opdkit.methods.eopd:eopd",
            "reopold": "opdkit.methods.reopold:reopold",
            "drift_gating": "opdkit.methods.drift_gating:drift_gating",
            "tip": "opdkit.methods.tip:tip",
            "gae_opd": "opdkit.methods.gae_opd:gae_opd",
            "cr_opd": "opdkit.methods.cr_opd:cr_opd",
        },
    ),
    "rewards": Family(
        "a teacher and a reward",
        "Rewards decide where, or how far, the teacher is followed.",
        {
            "scope": "opdkit.methods.scope:scope",
            "paced": "opdkit.methods.paced:paced",
            "kdrl": "opdkit.methods.kdrl:kdrl",
            "rlad": "opdkit.methods.rlad:rlad",
            "uni_opd": "opdkit.methods.uni_opd:uni_opd",
        },
    ),
    "self": Family(
        "the student as its own teacher",
        "The teacher is the student with another context, or other weights of it.",
        {
            "opsd": "opdkit.methods.opsd:opsd",
            "sdft": "opdkit.methods.sdft:sdft",
            "sdpo": "opdkit.methods.sdpo:sdpo",
            "pi_distill": "opdkit.methods.pi_distill:pi_distill",
            "opsd_rl": "opdkit.methods.pi_distill:opsd_rl",
            "selfci": "opdkit.methods.selfci:selfci",
            "trace": "opdkit.methods.trace:trace",
            "distil": "opdkit.methods.distil:distil",
            "cord": "opdkit.methods.cord:cord",
            "erpd": "opdkit.methods.erpd:erpd",
        },
    ),
    "agents": Family(
        "agents and several teachers",
        "Episodes of several turns, debates, action tokens.",
        {
            "skill_sd": "opdkit.methods.skill_sd:skill_sd",
            "mad_opd": "opdkit.methods.mad_opd:mad_opd",
            "opad": "opdkit.methods.mad_opd:opad",
            "tcod": "opdkit.methods.tcod:tcod",
            "vla_opd": "opdkit.methods.vla_opd:vla_opd",
        },
    ),
    "tokenizers": Family(
        "teachers with another tokenizer",
        "Distances that need no common index of the vocabulary.",
        {
            "uld": "opdkit.methods.uld:uld",
            "gold": "opdkit.methods.gold:gold",
        },
    ),
    "reinforcement": Family(
        "reinforcement learning",
        "Rewards alone, with a reference that the student stays near.",
        {
            "grpo": "opdkit.methods.grpo:grpo",
            "dgpo": "opdkit.methods.dgpo:dgpo",
            "gtpo": "opdkit.methods.gtpo:gtpo",
            "dmpo": "opdkit.methods.dmpo:dmpo",
            "rapo": "opdkit.methods.rapo:rapo",
            "dph_rl": "opdkit.methods.dph_rl:dph_rl",
            "remix": "opdkit.methods.remix:remix",
            "alp": "opdkit.methods.alp:alp",
            "apo": "opdkit.methods.apo:apo",
            "fg_expo": "opdkit.methods.fg_expo:fg_expo",
            "clip_cov": "opdkit.methods.clip_cov:clip_cov",
            "kl_cov": "opdkit.methods.clip_cov:kl_cov",
            "mdpo": "opdkit.methods.mdpo:mdpo",
            "recap": "opdkit.methods.recap:recap",
            "safe": "opdkit.methods.safe:safe",
        },
    ),
    "preferences": Family(
        "preferences",
        "Pairs of responses, of which one is preferred.",
        {
            "f_dpo": "opdkit.methods.f_dpo:f_dpo",
            "hypo": "opdkit.methods.hypo:hypo",
            "salsa": "opdkit.methods.salsa:salsa",
            "nash_mp": "opdkit.methods.nash_mp:nash_mp",
        },
    ),
    "distances": Family(
        "other distances to a teacher",
        "Optimal transport, rankings, divergences of whole sequences.",
        {
            "sinkd": "opdkit.methods.sinkd:sinkd",
            "pld": "opdkit.methods.pld:pld",
            "bd_kd": "opdkit.methods.bd_kd:bd_kd",
            "f_dpg": "opdkit.methods.f_dpg:f_dpg",
        },
    ),
}

METHODS: dict[str, str] = {
    name: address for family in FAMILIES.values() for name, address in family.methods.items()
}
