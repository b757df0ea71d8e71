"""The built-in methods: one file per paper.

Each name stands for a function that returns an Objective or a Method.
"""

METHODS: dict[str, str] = {
    # group 1: the standard forms and the featured methods
    "opd": "opdkit.methods.opd:opd",
    "gkd": "opdkit.methods.gkd:gkd",
    "gopd": "opdkit.methods.gopd:gopd",
    "exopd": "opdkit.methods.gopd:exopd",
    "tropd": "opdkit.methods.tropd:tropd",
    "iw_opd": "opdkit.methods.iw_opd:iw_opd",
    "position_opd": "opdkit.methods.position_opd:position_opd",
    "scope": "opdkit.methods.scope:scope",
    "vopd": "opdkit.methods.vopd:vopd",
    # group 2: the OPD objective family
    "eopd": "opdkit.methods.eopd:eopd",
    "reopold": "opdkit.methods.reopold:reopold",
    "drift_gating": "opdkit.methods.drift_gating:drift_gating",
    "topk_opd": "opdkit.methods.topk_opd:topk_opd",
    "kl_mixing": "opdkit.methods.kl_mixing:kl_mixing",
    "tip": "opdkit.methods.tip:tip",
    "paced": "opdkit.methods.paced:paced",
    "kdrl": "opdkit.methods.kdrl:kdrl",
    "rlad": "opdkit.methods.rlad:rlad",
    "uni_opd": "opdkit.methods.uni_opd:uni_opd",
    "gae_opd": "opdkit.methods.gae_opd:gae_opd",
    "cr_opd": "opdkit.methods.cr_opd:cr_opd",
    "minillm": "opdkit.methods.minillm:minillm",
    "distillm": "opdkit.methods.distillm:distillm",
    "grpo": "opdkit.methods.grpo:grpo",
    # group 3: teachers, self-distillation, curricula, agents
    "lightning_opd": "opdkit.methods.lightning_opd:lightning_opd",
    "uld": "opdkit.methods.uld:uld",
    "gold": "opdkit.methods.gold:gold",
    # the student with another context as its teacher
    "sft": "opdkit.methods.sft:sft",
    "dagger": "opdkit.methods.dagger:dagger",
    "opsd": "opdkit.methods.opsd:opsd",
    "sdft": "opdkit.methods.sdft:sdft",
    "sdpo": "opdkit.methods.sdpo:sdpo",
    # methods that train both contexts, or weigh spans
    "pi_distill": "opdkit.methods.pi_distill:pi_distill",
    "opsd_rl": "opdkit.methods.pi_distill:opsd_rl",
    "selfci": "opdkit.methods.selfci:selfci",
    "trace": "opdkit.methods.trace:trace",
    "distil": "opdkit.methods.distil:distil",
    # agents, several teachers
    "skill_sd": "opdkit.methods.skill_sd:skill_sd",
    "cord": "opdkit.methods.cord:cord",
    "mad_opd": "opdkit.methods.mad_opd:mad_opd",
    "opad": "opdkit.methods.mad_opd:opad",
    "erpd": "opdkit.methods.erpd:erpd",
    "vla_opd": "opdkit.methods.vla_opd:vla_opd",
    # depth of turns
    "tcod": "opdkit.methods.tcod:tcod",
}
