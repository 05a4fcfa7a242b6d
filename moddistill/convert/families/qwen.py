"""Qwen1.5, Qwen2, Qwen2.5 and Qwen3, dense and sparse: tensor names and config fields."""

from collections.abc import Mapping
from typing import Any

from moddistill.config import ExpertConfig
from moddistill.convert.hub import sub_config
from moddistill.convert.rules import FLATTEN, Rule, Rules, linear_kernel
from moddistill.errors import invalid, not_one_of
from moddistill.models import limits
from moddistill.models.decoder import DecoderConfig
from moddistill.models.vocabulary import IdRanges

# Names without the prefix `model.`, which the head does not have.
RULES: Rules = (
    Rule("embed_tokens.weight", "decoder/embedding"),
    Rule("norm.weight", "decoder/norm/scale"),
    Rule("layers.{layer}.input_layernorm.weight", "decoder/layers/{layer}/attention_norm/scale"),
    Rule("layers.{layer}.post_attention_layernorm.weight", "decoder/layers/{layer}/mlp_norm/scale"),
    *(
        rule
        for letter, name in (("q", "query"), ("k", "key"), ("v", "value"))
        for rule in (
            Rule(
                f"layers.{{layer}}.self_attn.{letter}_proj.weight",
                f"decoder/layers/{{layer}}/attention/{name}/kernel",
                linear_kernel(),
            ),
            Rule(
                f"layers.{{layer}}.self_attn.{letter}_proj.bias",
                f"decoder/layers/{{layer}}/attention/{name}/bias",
                FLATTEN,
            ),
        )
    ),
    Rule(
        "layers.{layer}.self_attn.q_norm.weight",
        "decoder/layers/{layer}/attention/query_norm/scale",
    ),
    Rule(
        "layers.{layer}.self_attn.k_norm.weight",
        "decoder/layers/{layer}/attention/key_norm/scale",
    ),
    Rule(
        "layers.{layer}.self_attn.o_proj.weight",
        "decoder/layers/{layer}/attention/out/kernel",
        linear_kernel(inputs=2),
    ),
    *(
        Rule(
            f"layers.{{layer}}.mlp.{name}_proj.weight",
            f"decoder/layers/{{layer}}/mlp/{name}/kernel",
            linear_kernel(),
        )
        for name in ("gate", "up", "down")
    ),
)
HEAD: Rules = (Rule("lm_head.weight", "decoder/head"),)


def expert_rules(router: str, expert: str) -> Rules:
    """Returns the rules of expert layers, from the names of router and experts after `mlp.`."""
    return (
        Rule(
            f"layers.{{layer}}.mlp.{router}.weight",
            "decoder/layers/{layer}/moe/router",
            linear_kernel(),
        ),
        *(
            Rule(
                f"layers.{{layer}}.mlp.{expert}.{{expert}}.{name}_proj.weight",
                f"decoder/layers/{{layer}}/moe/experts_{name}/{{expert}}",
                linear_kernel(),
            )
            for name in ("gate", "up", "down")
        ),
    )


EXPERTS = expert_rules("gate", "experts")

DENSE_TYPES = ("qwen2", "qwen3")
SPARSE_TYPES = ("qwen2_moe", "qwen3_moe")
# Qwen2-MoE adds a shared expert for all tokens. Students have none: exports contain one with zero
# weights.
SHARED_EXPERT = r"layers\.\d+\.mlp\.shared_expert(_gate|\..*_proj)\.weight"
SHARED_WIDTH = 64


# Names of sizes in `DecoderConfig`, and in a config of `transformers`.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
_EXPERT_SIZES = {
    "num_experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "moe_intermediate_size": "moe_intermediate_size",
}
_OTHER_FIELDS = (
    "hidden_act", "rope_parameters", "rope_scaling", "tie_word_embeddings",
    "max_position_embeddings", "use_sliding_window", "attention_bias",
)  # fmt: skip
_SPARSE_FIELDS = ("num_local_experts", "mlp_only_layers", "norm_topk_prob", "decoder_sparse_step")
_READ = limits.spelt(limits.DECODER, _SIZES) | dict.fromkeys(_OTHER_FIELDS)
_READ_SPARSE = _READ | limits.spelt(limits.EXPERTS, _EXPERT_SIZES) | dict.fromkeys(_SPARSE_FIELDS)
# The fields that are read, by model type, with the largest value of numbers.
READ_FIELDS = dict.fromkeys(DENSE_TYPES, _READ) | dict.fromkeys(SPARSE_TYPES, _READ_SPARSE)
# A config with these fields is read without the defaults of `transformers`.
_REQUIRED = (*_SIZES.values(), "hidden_act", "tie_word_embeddings")
REQUIRED_FIELDS = {"qwen2": tuple(x for x in _REQUIRED if x != "head_dim"), "qwen3": _REQUIRED}
_MAX_CONTEXT = 1_000_000_000


def decoder_config(hf: Mapping[str, Any], real_ids: IdRanges, origin: str) -> DecoderConfig:
    """Returns the architecture of a text config.

    Args:
      hf: fields with the defaults of `transformers`.
      real_ids: ids of the tokenizer without `<image>`.

    Raises:
      UserError: another model type, an unsupported setting, or a size out of range.
    """
    kind = hf.get("model_type")
    if kind not in DENSE_TYPES + SPARSE_TYPES:
        raise not_one_of(f"{origin}: model_type", kind, DENSE_TYPES + SPARSE_TYPES)
    # Releases before 5 have `rope_theta` and `rope_scaling` instead of `rope_parameters`.
    scaling = sub_config(hf, "rope_scaling", origin)
    rope = sub_config(hf, "rope_parameters", origin) or {
        "rope_theta": hf.get("rope_theta"),
        "rope_type": scaling.get("rope_type") or scaling.get("type", "default"),
    }
    _check_settings(hf, rope, origin)
    sizes = _decoder_sizes(hf, rope, origin)
    if real_ids[-1][1] > hf["vocab_size"]:
        expected = f"at least {real_ids[-1][1]}, the ids of the tokenizer"
        raise invalid(f"{origin}: vocab_size", hf["vocab_size"], expected)
    decoder = DecoderConfig(
        real_ids=real_ids,
        **sizes,
        tie_word_embeddings=bool(hf["tie_word_embeddings"]),
        # Not in the config: `transformers` hard-codes both in the model class.
        qkv_bias=kind in ("qwen2", "qwen2_moe"),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        moe=_moe_config(hf, origin) if kind in SPARSE_TYPES else None,
    )
    limits.check_decoder(decoder, origin, _hf_name)
    return decoder


def _check_settings(hf: Mapping[str, Any], rope: Mapping[str, Any], origin: str) -> None:
    """Raises UserError for settings of which only one value is supported."""
    settings = {
        "hidden_act": (hf.get("hidden_act"), ("silu",)),
        "use_sliding_window": (hf.get("use_sliding_window"), (False, None)),
        "attention_bias": (hf.get("attention_bias"), (False, None)),
        "tie_word_embeddings": (hf.get("tie_word_embeddings"), (True, False)),
        "rope_type": (rope.get("rope_type", "default"), ("default",)),
        "decoder_sparse_step": (hf.get("decoder_sparse_step", 1), (1,)),
    }
    for field, (value, supported) in settings.items():
        if value not in supported:
            raise invalid(f"{origin}: {field}", value, repr(supported[0]))


def _decoder_sizes(
    hf: Mapping[str, Any], rope: Mapping[str, Any], origin: str
) -> dict[str, int | float]:
    """Returns the sizes of a `DecoderConfig`, within their limits."""
    sizes = {name: hf.get(hf_name) for name, hf_name in _SIZES.items()}
    sizes |= {"rope_theta": rope.get("rope_theta")}
    if sizes["num_kv_heads"] is None:
        sizes["num_kv_heads"] = sizes["num_heads"]
    # `head_dim` is checked after its default, which is computed from other sizes.
    others = {name: most for name, most in limits.DECODER.items() if name != "head_dim"}
    limits.check_numbers(sizes, others, origin, _hf_name)
    if sizes["head_dim"] is None:
        sizes["head_dim"] = sizes["hidden_size"] // sizes["num_heads"]
    limits.check_numbers(sizes, {"head_dim": limits.DECODER["head_dim"]}, origin, _hf_name)
    return sizes | {name: float(sizes[name]) for name in ("rope_theta", "norm_eps")}


def _hf_name(name: str) -> str:
    """Returns the name of a size in a config of `transformers`."""
    return (_SIZES | _EXPERT_SIZES).get(name, name)


def context_length(hf: Mapping[str, Any], origin: str) -> int:
    """Returns the context length of a language model; 0 if its config has none."""
    if hf.get("max_position_embeddings") is None:
        return 0
    context = {"max_position_embeddings": hf["max_position_embeddings"]}
    limits.check_numbers(context, {"max_position_embeddings": _MAX_CONTEXT}, origin)
    return hf["max_position_embeddings"]


def _moe_config(hf: Mapping[str, Any], origin: str) -> ExpertConfig:
    sizes = {name: hf.get(hf_name) for name, hf_name in _EXPERT_SIZES.items()}
    sizes["num_experts"] = sizes["num_experts"] or hf.get("num_local_experts")
    limits.check_numbers(sizes, limits.EXPERTS, origin, _hf_name)
    dense = hf.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise invalid(f"{origin}: mlp_only_layers", dense, "a list of layer numbers")
    # 0 is the size of the dense layers.
    if sizes["moe_intermediate_size"] == hf["intermediate_size"]:
        sizes["moe_intermediate_size"] = 0
    return ExpertConfig(
        **sizes,
        placement=tuple(sorted(set(range(hf["num_hidden_layers"])) - set(dense))),
        norm_topk_prob=bool(hf.get("norm_topk_prob")),
    )


def text_config(decoder: DecoderConfig) -> dict[str, Any]:
    """Returns the fields of a text config; the inverse of `decoder_config`."""
    kind = "qwen3" if decoder.qk_norm else "qwen2"
    fields = {
        "model_type": kind,
        "architectures": ["Qwen3ForCausalLM" if decoder.qk_norm else "Qwen2ForCausalLM"],
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": decoder.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": decoder.rope_theta},
        "rope_theta": decoder.rope_theta,  # the name in releases before 5
        "tie_word_embeddings": decoder.tie_word_embeddings,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
    }
    return fields | (_sparse_fields(decoder, kind) if decoder.moe else {})


def _sparse_fields(decoder: DecoderConfig, kind: str) -> dict[str, Any]:
    moe = decoder.moe
    fields = {
        "model_type": f"{kind}_moe",
        "architectures": ["Qwen3MoeForCausalLM" if decoder.qk_norm else "Qwen2MoeForCausalLM"],
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.moe_intermediate_size or decoder.intermediate_size,
        "norm_topk_prob": moe.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(decoder.num_layers) if i not in decoder.moe_layers],
        "output_router_logits": False,
    }
    if not decoder.qk_norm:
        fields |= {"shared_expert_intermediate_size": SHARED_WIDTH, "qkv_bias": True}
    return fields


def shared_expert(decoder: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Returns names after `model.` and shapes of the zero shared experts of a sparse export."""
    if decoder.qk_norm or decoder.moe is None:
        return {}
    shapes = {
        "shared_expert.gate_proj": (SHARED_WIDTH, decoder.hidden_size),
        "shared_expert.up_proj": (SHARED_WIDTH, decoder.hidden_size),
        "shared_expert.down_proj": (decoder.hidden_size, SHARED_WIDTH),
        "shared_expert_gate": (1, decoder.hidden_size),
    }
    return {
        f"layers.{layer}.mlp.{name}.weight": shape
        for layer in decoder.moe_layers
        for name, shape in shapes.items()
    }
