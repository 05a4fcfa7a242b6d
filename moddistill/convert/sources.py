"""Recognition of Hugging Face folders: the parts of a model, and the rules for its tensors."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from moddistill.convert.families import deepspeed, llava, qwen
from moddistill.convert.hub import check_not_quantized, sub_config, with_defaults
from moddistill.convert.jinja_template import detect_template
from moddistill.convert.rules import Rules, prefixed
from moddistill.convert.source_settings import image_processor
from moddistill.data.tokenizer import Tokenizer, load_tokenizer
from moddistill.errors import UserError, invalid, not_one_of
from moddistill.models.decoder import DecoderConfig
from moddistill.models.limits import check_decoder, check_pixels
from moddistill.models.vision import VisionConfig
from moddistill.storage import digests
from moddistill.storage.json_file import read_json
from moddistill.storage.shards import open_checkpoint
from moddistill.storage.tensor import Checkpoint

# Patterns of buffers, which early releases of `transformers` saved.
_BUFFERS = (r".*rotary_emb\.inv_freq", r".*embeddings\.position_ids")
SELECT_LAYER = -2  # hidden state of the vision tower, as in LLaVA
_LARGEST_SETTINGS = 64 * 2**20  # bytes; a tokenizer.json has up to 36 MB
_UNDAMAGED = f"an undamaged copy, or the folder without its {digests.NAME}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A Hugging Face folder: its checkpoint, rules and parts; missing parts are None.

    Attributes:
      rules: of the tensors of all parts.
      ignored: patterns of tensor names that are not read.
      zero: pattern of tensor names that are not read and must be zero.
      tied: name of a head that must equal the embedding, if it is stored.
      pooling: prefix of the pooling head of the vision tower, which is copied for the export.
      select_layer: hidden state that the config selects of a separate vision tower.
      context: of the language model, in tokens; 0 if its config has none.
    """

    folder: Path
    checkpoint: Checkpoint
    rules: Rules
    ignored: tuple[str, ...] = _BUFFERS
    zero: str = ""
    tied: str = ""
    pooling: str = ""
    decoder: DecoderConfig | None = None
    vision: VisionConfig | None = None
    projector: str | None = None
    tokenizer: Tokenizer | None = None
    template: str = "chatml"
    select_layer: int | None = None
    context: int = 0

    @property
    def parts(self) -> tuple[str, ...]:
        """First path components of its parameters."""
        return tuple(
            part for part in ("decoder", "vision", "projector") if getattr(self, part) is not None
        )


def open_source(folder: Path, select_layer: int | None = None) -> Source:
    """Recognises a folder by its config.

    Args:
      select_layer: hidden state of the vision tower to use; None for that of the config, or -2.

    Raises:
      UserError: an unknown architecture or an unsupported config.
    """
    if (folder / digests.NAME).is_file():  # written by our export
        _verify_export(folder)
    fields = read_json(folder / "config.json")
    origin = str(folder / "config.json")
    kind = fields.get("model_type", "")
    if not isinstance(kind, str):
        raise invalid(f"{origin}: model_type", kind, "a name")
    check_not_quantized(fields, origin)
    if kind in qwen.DENSE_TYPES + qwen.SPARSE_TYPES:
        required = qwen.REQUIRED_FIELDS.get(kind, ())
        return _language_model(folder, with_defaults(fields, llava.READ_FIELDS, origin, required))
    if kind in llava.DUAL_ENCODERS or kind in llava.TOWERS:
        return _tower(folder, fields, SELECT_LAYER if select_layer is None else select_layer)
    if kind == "llava":
        _check_parts(fields, origin)
        return _llava(
            folder, with_defaults(fields, llava.READ_FIELDS, origin), fields, select_layer
        )
    if "llava" in kind and "qwen" in kind:
        return _original(folder, fields, select_layer)
    known = (*qwen.DENSE_TYPES, *qwen.SPARSE_TYPES, *llava.DUAL_ENCODERS, *llava.TOWERS, "llava")
    expected = f"one of {', '.join(known)}, or one of LLaVA's code with Qwen, as llava_qwen2"
    raise invalid(f"{origin}: model_type", kind, expected)


def _verify_export(folder: Path) -> None:
    """Raises UserError if a file of an export does not match its digest."""
    listed = digests.read_digests(folder, _UNDAMAGED).files
    # Settings files that are too large are refused by their readers, which bound what they read.
    names = [name for name in sorted(listed) if _is_readable(folder / name)]
    digests.verify(folder, names, expected=_UNDAMAGED)


def _is_readable(file: Path) -> bool:
    is_weights = file.suffix in (".safetensors", ".bin")
    return is_weights or not file.is_file() or file.stat().st_size <= _LARGEST_SETTINGS


def _language_model(folder: Path, hf: dict[str, Any]) -> Source:
    tokenizer = load_tokenizer(str(folder))
    origin = str(folder / "config.json")
    return Source(
        folder=folder,
        checkpoint=open_checkpoint(folder),
        rules=(*prefixed(qwen.RULES + qwen.EXPERTS, "model."), *qwen.HEAD),
        zero=rf"model\.{qwen.SHARED_EXPERT}",
        tied="lm_head.weight",
        decoder=qwen.decoder_config(hf, tokenizer.real_ids, origin),
        context=qwen.context_length(hf, origin),
        tokenizer=tokenizer,
        template=detect_template(folder),
    )


def _tower(folder: Path, fields: dict[str, Any], select_layer: int) -> Source:
    kind = fields["model_type"]
    origin = str(folder / "config.json")
    if kind in llava.DUAL_ENCODERS:
        kind = llava.DUAL_ENCODERS[kind]
        fields = {**sub_config(fields, "vision_config", origin), "model_type": kind}
    family = llava.TOWERS[kind]
    hf = with_defaults(fields, llava.READ_FIELDS, origin)
    checkpoint = open_checkpoint(folder)
    nested = any(name.startswith("vision_model.") for name in checkpoint)
    prefix = "vision_model." if nested else ""
    text_encoder = (
        r"text_model\..*",
        r"(text|visual)_projection\.weight",
        "logit_scale",
        "logit_bias",
    )
    return Source(
        folder=folder,
        checkpoint=checkpoint,
        rules=prefixed(family.RULES, prefix),
        ignored=(*_BUFFERS, *text_encoder),
        pooling=f"{prefix}head.",
        vision=family.vision_config(hf, select_layer, _pixels(folder), origin),
    )


def _check_parts(fields: dict[str, Any], origin: str) -> None:
    """Raises UserError for an unknown text or vision model."""
    known = {"text_config": qwen.DENSE_TYPES + qwen.SPARSE_TYPES, "vision_config": llava.TOWERS}
    for part, accepted in known.items():
        kind = sub_config(fields, part, origin).get("model_type")
        if kind not in tuple(accepted):
            raise not_one_of(f"{origin}: {part}.model_type", kind, accepted)


def _llava(
    folder: Path, hf: dict[str, Any], stated: dict[str, Any], select_layer: int | None
) -> Source:
    """Returns the parts of a LLaVA checkpoint of `transformers`.

    Args:
      hf: config with the defaults of `transformers`.
      stated: config as in the file.
    """
    origin = str(folder / "config.json")
    family = llava.TOWERS[hf["vision_config"]["model_type"]]
    llava.check_projector(hf, origin)
    tokenizer = load_tokenizer(str(folder))
    if hf["image_token_index"] != tokenizer.image_id:
        expected = f"{tokenizer.image_id}, the id of <image> in the tokenizer"
        raise invalid(f"{origin}: image_token_index", hf["image_token_index"], expected)
    checkpoint = open_checkpoint(folder)
    prefixes = llava.find_prefixes(checkpoint, family)
    decoder, head, vision, _ = prefixes
    layer = llava.select_layer(hf, origin) if select_layer is None else select_layer
    text = hf["text_config"] | {"tie_word_embeddings": _tied(stated, head, checkpoint, origin)}
    return Source(
        folder=folder,
        checkpoint=checkpoint,
        rules=llava.checkpoint_rules(prefixes, family),
        pooling=f"{vision}head.",
        zero=re.escape(decoder) + qwen.SHARED_EXPERT,
        tied=f"{head}lm_head.weight",
        decoder=qwen.decoder_config(text, tokenizer.real_ids, origin),
        context=qwen.context_length(text, origin),
        vision=family.vision_config(hf["vision_config"], layer, _pixels(folder), origin),
        projector="mlp2x_gelu",
        tokenizer=tokenizer,
        template=detect_template(folder),
    )


def _tied(stated: dict[str, Any], head: str, checkpoint: Checkpoint, origin: str) -> bool:
    """Returns whether the head is the embedding.

    Releases of `transformers` state it in the config, in its text config, or in neither; then the
    checkpoint decides.
    """
    name = "tie_word_embeddings"
    values = [part[name] for part in (stated, stated["text_config"]) if name in part]
    for value in values:
        if type(value) is not bool:
            raise invalid(f"{origin}: {name}", value, "true or false")
    return any(values) if values else f"{head}lm_head.weight" not in checkpoint


def _original(folder: Path, fields: dict[str, Any], select_layer: int | None) -> Source:
    """Returns the parts of a checkpoint of LLaVA's or LLaVA-MoD's code.

    It has Qwen's names, `mm_projector`, and experts of DeepSpeed's MoE layer.
    """
    checkpoint = open_checkpoint(folder)
    tokenizer = load_tokenizer(str(folder))
    origin = str(folder / "config.json")
    kind = "qwen3" if "qwen3" in fields["model_type"] else "qwen2"
    text = with_defaults(fields | {"model_type": kind}, llava.READ_FIELDS, origin)
    decoder = qwen.decoder_config(text, tokenizer.real_ids, origin)
    llava.check_original(fields, origin)
    decoder = dataclasses.replace(decoder, moe=deepspeed.expert_config(fields, checkpoint, origin))
    check_decoder(decoder, origin)
    layer = fields.get("mm_vision_select_layer")
    if layer is not None and (type(layer) is not int or not -1000 <= layer < 0):
        raise invalid(f"{origin}: mm_vision_select_layer", layer, "a whole number below 0")
    projector = fields.get("image_projector_type") or fields.get("mm_projector_type") or "linear"
    # Code derived from MoE-LLaVA nests the projector in one more module.
    inner = "image_spatial_proj."
    spatial = any(inner in name for name in checkpoint)
    prefix = "model.mm_projector." + (inner if spatial else "")
    return Source(
        folder=folder,
        checkpoint=checkpoint,
        rules=(
            *prefixed(qwen.RULES + deepspeed.EXPERTS, "model."),
            *qwen.HEAD,
            *prefixed(_projector_rules(projector, origin), prefix),
        ),
        # The vision tower is imported separately; one in this checkpoint must be equal.
        ignored=(*_BUFFERS, r"model\.(vision|image)_tower\..*"),
        tied="lm_head.weight",
        decoder=decoder,
        projector=projector,
        tokenizer=tokenizer,
        template="vicuna",
        select_layer=layer,
        context=qwen.context_length(text, origin),
    )


def _pixels(folder: Path) -> dict[str, tuple[float, ...]]:
    """Returns mean and standard deviation of the pixels, if the image processor has them."""
    fields = image_processor(folder)
    if "image_mean" in fields and "image_std" in fields:
        origin = f"{folder}: image processor"
        return {key: _rgb(fields, f"image_{key}", origin) for key in ("mean", "std")}
    return {}


def _rgb(fields: dict[str, Any], name: str, origin: str) -> tuple[float, ...]:
    check_pixels(fields[name], f"{origin}: {name}", above_zero=name == "image_std")
    return tuple(float(x) for x in fields[name])


def _projector_rules(kind: Any, origin: str) -> Rules:
    try:
        return llava.original_projector(kind if isinstance(kind, str) else repr(kind))
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
