"""Experts of LLaVA-MoD's own checkpoints, which are those of DeepSpeed's MoE layer."""

import re
from collections.abc import Mapping
from typing import Any

from moddistill.config import ExpertConfig
from moddistill.convert.families.qwen import expert_rules
from moddistill.convert.hub import sub_config
from moddistill.errors import UserError, invalid
from moddistill.models import limits

EXPERTS = expert_rules("deepspeed_moe.gate.wg", "deepspeed_moe.experts.deepspeed_experts")


def expert_config(
    fields: Mapping[str, Any], names: Mapping[str, Any], origin: str
) -> ExpertConfig | None:
    """Returns the experts of a sparse checkpoint of LLaVA-MoD's code; None for a dense one.

    Its config does not have the number of experts and their layers; tensor names do.

    Raises:
      UserError: the config lacks `moe.top_k_experts`, or the experts are residual.
    """
    module = r"mlp\.deepspeed_moe\.experts\.deepspeed_experts"
    pattern = rf"model\.layers\.(\d{{1,9}})\.{module}\.(\d{{1,9}})\..*"
    experts = [match.groups() for name in names if (match := re.fullmatch(pattern, name))]
    if not experts:
        return None
    moe = sub_config(fields, "moe", origin)
    if "top_k_experts" not in moe:
        raise UserError(f"{origin}: expected moe.top_k_experts for weights with experts, got none")
    if moe.get("use_residual"):
        raise invalid(f"{origin}: moe.use_residual", moe["use_residual"], "false")
    top_k = moe["top_k_experts"]
    limit = {"moe.top_k_experts": limits.EXPERTS["top_k"]}
    limits.check_numbers({"moe.top_k_experts": top_k}, limit, origin)
    return ExpertConfig(
        num_experts=1 + max(int(expert) for _, expert in experts),
        top_k=top_k,
        placement=tuple(sorted({int(layer) for layer, _ in experts})),
        # DeepSpeed's top-2 gating normalises the weights of the experts, its top-1 gating does not.
        norm_topk_prob=top_k >= 2,
    )
