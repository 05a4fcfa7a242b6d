"""What engines refuse of an export, or compute differently: one row a rule.

A rule is a function that finds the fault in an export, what to do, and the file of each engine that
decides. Releases read: transformers 5.24, vLLM 0.32, SGLang 0.5.23, and llama.cpp
of November 2026.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from moddistill.convert.families import llava
from moddistill.convert.sources import Source
from moddistill.models.presets import QWEN_VOCAB

Engine = Literal["transformers", "vllm", "sglang", "llama.cpp"]


@dataclasses.dataclass(frozen=True)
class Export:
    """A folder of `export`: its recognised parts, its config, and what files it has.

    Attributes:
      files: names of the files in the folder.
    """

    source: Source
    config: dict[str, Any]
    files: frozenset[str]


class EngineRule(NamedTuple):
    """A fault that engines refuse.

    Attributes:
      find: returns what the export has, or an empty text if the rule does not apply.
      remedy: what to do.
      origins: the file of each engine with the condition.
    """

    find: Callable[[Export], str]
    remedy: str
    origins: dict[Engine, str]


# Head sizes of vLLM's attention for CPUs.
_CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_OTHER_ENGINE = "serve it with vLLM or transformers"


def _rows_without_tokens(export: Export) -> str:
    source = export.source
    last = source.decoder.real_ids[-1][1] - 1
    if source.vision is not None:
        last = max(last, source.tokenizer.image_id)
    rows = source.decoder.vocab_size
    if last + 1 == rows:
        return ""
    return f"{rows - last - 1} of {rows} embedding rows are no tokens, and can be generated"


def _image_token_without_row(export: Export) -> str:
    index, rows = export.config.get("image_token_index"), export.source.decoder.vocab_size
    if export.source.vision is None or index < rows:
        return ""
    return f"image_token_index {index} is not among the {rows} embedding rows"


def _no_processor(export: Export) -> str:
    missing = [name for name in _PROCESSOR_FILES if name not in export.files]
    return f"no {' and no '.join(missing)}" if export.source.vision and missing else ""


def _tower_names(export: Export) -> str:
    prefix = llava.PUBLISHED_PREFIXES[2]
    towers = [name for name in export.source.checkpoint if "vision_tower." in name]
    others = [name for name in towers if prefix not in name]
    return f"tensors such as {min(others)} in place of {prefix}*" if others else ""


def _head_size(export: Export) -> str:
    decoder = export.source.decoder
    if decoder.qk_norm or decoder.head_dim * decoder.num_heads == decoder.hidden_size:
        return ""
    return (
        f"head_dim {decoder.head_dim}, which it takes to be hidden_size / num_attention_heads, "
        f"{decoder.hidden_size} / {decoder.num_heads}"
    )


def _head_size_on_cpu(export: Export) -> str:
    size = export.source.decoder.head_dim
    return "" if size in _CPU_HEADS else f"head_dim {size}, which its attention for CPUs lacks"


def _dense_layers(export: Export) -> str:
    decoder = export.source.decoder
    dense = [i for i in range(decoder.num_layers) if i not in decoder.moe_layers]
    return f"dense layers {dense} in a sparse model" if decoder.moe and dense else ""


def _select_strategy(export: Export) -> str:
    strategy = export.config.get("vision_feature_select_strategy")
    return f"vision_feature_select_strategy {strategy!r}" if strategy == "default" else ""


def _vision_tower(export: Export) -> str:
    kind = export.config.get("vision_config", {}).get("model_type")
    return f"a vision encoder of type {kind!r} in LlavaForConditionalGeneration" if kind else ""


def _renormalised_weights(export: Export) -> str:
    moe = export.source.decoder.moe
    if moe is None or export.source.decoder.qk_norm or not moe.norm_topk_prob:
        return ""
    return f"router weights of the top {moe.top_k} that sum to one, which it does not divide"


def _tied_head(export: Export) -> str:
    decoder = export.source.decoder
    is_tied = decoder.moe and not decoder.qk_norm and decoder.tie_word_embeddings
    stored = export.source.tied in export.source.checkpoint
    return (
        "no tensor lm_head.weight, as the head is the embedding" if is_tied and not stored else ""
    )


def _other_tokenizer(export: Export) -> str:
    ids = export.source.decoder.real_ids[-1][1]
    # Releases of Qwen add control tokens to one vocabulary, of which all but three are text.
    if ids >= QWEN_VOCAB - 3:
        return ""
    return f"a tokenizer of {ids} ids that is not Qwen's, whose pre-tokenizer it does not know"


RULES = (
    EngineRule(
        _rows_without_tokens,
        "export with --vocabulary cut, as the engine ignores suppress_tokens",
        {"vllm": "vllm/config/model.py", "sglang": "sglang/srt/configs/model_config.py"},
    ),
    EngineRule(
        _image_token_without_row,
        "export again; the embedding of image_token_index is looked up",
        {"transformers": "transformers/models/llava/modeling_llava.py"},
    ),
    EngineRule(
        _no_processor,
        "export again, or copy the file from the export",
        {
            "transformers": "transformers/models/auto/processing_auto.py",
            "vllm": "vllm/transformers_utils/processor.py",
            "sglang": "sglang/srt/utils/hf_transformers_utils.py",
        },
    ),
    EngineRule(
        _tower_names,
        "import the folder and export it again, which writes the names of published checkpoints",
        {"vllm": "vllm/model_executor/models/llava.py"},
    ),
    EngineRule(
        _head_size,
        "serve it with transformers",
        {"vllm": "vllm/model_executor/models/qwen2.py"},
    ),
    EngineRule(
        _head_size_on_cpu,
        f"serve it on a GPU or with transformers; CPUs have {', '.join(map(str, _CPU_HEADS))}",
        {"vllm": "vllm/v1/attention/backends/cpu_attn.py"},
    ),
    EngineRule(
        _dense_layers,
        "export with --uniform",
        {
            "sglang": "sglang/srt/models/qwen2_moe.py, qwen3_moe.py",
            "llama.cpp": "llama.cpp/src/models/qwen2moe.cpp, qwen3moe.cpp",
        },
    ),
    EngineRule(_select_strategy, _OTHER_ENGINE, {"sglang": "sglang/srt/models/llava.py"}),
    EngineRule(
        _vision_tower,
        _OTHER_ENGINE,
        {
            "sglang": "sglang/srt/models/clip.py, siglip.py",
            "llama.cpp": "llama.cpp/conversion/llava.py",
        },
    ),
    EngineRule(
        _renormalised_weights,
        f"{_OTHER_ENGINE}; its graph of Qwen3-MoE does divide them",
        {"llama.cpp": "llama.cpp/src/models/qwen2moe.cpp"},
    ),
    EngineRule(
        _tied_head,
        f"{_OTHER_ENGINE}; its graph of Qwen3-MoE takes the embedding",
        {"llama.cpp": "llama.cpp/src/models/qwen2moe.cpp"},
    ),
    EngineRule(
        _other_tokenizer,
        "serve it with another engine, or add the pre-tokenizer to llama.cpp",
        {"llama.cpp": "llama.cpp/conversion/base.py"},
    ),
)
CLASSES = (
    "LlavaForConditionalGeneration",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
)
