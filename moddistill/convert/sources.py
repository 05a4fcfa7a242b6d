"""What a Hugging Face folder holds: the parts of a model, and the rules of its names."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from moddistill.convert.chat_template import detect_template
from moddistill.convert.families import llava, qwen
from moddistill.convert.hub import check_not_quantized, sub_config, with_defaults
from moddistill.convert.rules import Rules, prefixed
from moddistill.convert.source_settings import image_processor
from moddistill.data.tokenizer import Tokenizer, load_tokenizer
from moddistill.errors import UserError
from moddistill.models.decoder import DecoderConfig
from moddistill.models.limits import check_decoder, check_pixels
from moddistill.models.vision import VisionConfig
from moddistill.storage import digests
from moddistill.storage.json_file import read_json
from moddistill.storage.shards import open_checkpoint
from moddistill.storage.tensor import Checkpoint

# Buffers that old releases saved.
_BUFFERS = (r".*rotary_emb\.inv_freq", r".*embeddings\.position_ids")
SELECT_LAYER = -2  # LLaVA's
_LARGEST_SETTINGS = 64 * 2**20  # bytes; a tokenizer.json has up to 36 MB
_UNDAMAGED = f"an undamaged copy, or the folder without its {digests.NAME}"


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder's parts; those it does not have are None.

    Attributes:
      rules: of all its parts.
      ignored: patterns of names that are not read.
      zero: patterns of names that are not read and must be zero.
      tied: name of a head that must equal the embedding, if it is stored at all.
      pooling: what the names of the tower's pooling head begin with; it is carried along.
      select_layer: hidden state of a tower beside it that the config asks for.
      context: positions that the language model was made for.
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
    context: int | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """First path components of the parameters it has."""
        return tuple(
            part for part in ("decoder", "vision", "projector") if getattr(self, part) is not None
        )


def open_source(folder: Path, select_layer: int | None = None) -> Source:
    """Recognises a folder by its config.

    Args:
      select_layer: hidden state of the tower to use; as the config says if None, or LLaVA's -2.

    Raises:
      UserError: for an architecture that is not known, naming those that are.
    """
    if (folder / digests.NAME).is_file():  # an export of ours
        listed = digests.read_digests(folder, _UNDAMAGED).files
        # Settings that are too large are refused by their readers, which do not read them whole.
        names = [name for name in sorted(listed) if _is_readable(folder / name)]
        digests.verify(folder, names, expected=_UNDAMAGED)
    fields = read_json(folder / "config.json")
    origin = str(folder / "config.json")
    kind = fields.get("model_type", "")
    if not isinstance(kind, str):
        raise UserError(f"{origin}: model_type is {kind!r:.80}; accepted: a name")
    check_not_quantized(fields, origin)
    if kind in qwen.DENSE_TYPES + qwen.SPARSE_TYPES:
        needed = qwen.NEEDED.get(kind, ())
        return _language_model(folder, with_defaults(fields, llava.READ, origin, needed))
    if kind in llava.DUAL_ENCODERS or kind in llava.TOWERS:
        return _tower(folder, fields, SELECT_LAYER if select_layer is None else select_layer)
    if kind == "llava":
        _check_parts(fields, origin)
        return _llava(folder, with_defaults(fields, llava.READ, origin), fields, select_layer)
    if "llava" in kind and "qwen" in kind:
        return _original(folder, fields, select_layer)
    known = (*qwen.DENSE_TYPES, *qwen.SPARSE_TYPES, *llava.DUAL_ENCODERS, *llava.TOWERS, "llava")
    raise UserError(
        f"{str(folder)!r} is of architecture {kind!r:.80}; accepted: {', '.join(known)}, and the "
        "original LLaVA code's with Qwen (llava_qwen2 and the like)"
    )


def _is_readable(file: Path) -> bool:
    is_weights = file.suffix in (".safetensors", ".bin")
    return is_weights or not file.is_file() or file.stat().st_size <= _LARGEST_SETTINGS


def _language_model(folder: Path, hf: dict[str, Any]) -> Source:
    tokenizer = load_tokenizer(str(folder))
    origin = str(folder / "config.json")
    return Source(
        folder,
        open_checkpoint(folder),
        (*prefixed(qwen.RULES + qwen.EXPERTS, "model."), *qwen.HEAD),
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
    hf = with_defaults(fields, llava.READ, origin)
    checkpoint = open_checkpoint(folder)
    nested = any(name.startswith("vision_model.") for name in checkpoint)
    prefix = "vision_model." if nested else ""
    beside = (r"text_model\..*", r"(text|visual)_projection\.weight", "logit_scale", "logit_bias")
    return Source(
        folder,
        checkpoint,
        prefixed(family.RULES, prefix),
        ignored=(*_BUFFERS, *beside),
        pooling=f"{prefix}head.",
        vision=family.vision_config(hf, select_layer, _pixels(folder), origin),
    )


def _check_parts(fields: dict[str, Any], origin: str) -> None:
    """Raises UserError for a text or vision model that is not known."""
    known = {"text_config": qwen.DENSE_TYPES + qwen.SPARSE_TYPES, "vision_config": llava.TOWERS}
    for part, accepted in known.items():
        kind = sub_config(fields, part, origin).get("model_type")
        if kind not in tuple(accepted):
            raise UserError(
                f"{origin}: {part} is of type {kind!r:.80}; accepted: {', '.join(accepted)}"
            )


def _llava(
    folder: Path, hf: dict[str, Any], stated: dict[str, Any], select_layer: int | None
) -> Source:
    """From the config with its defaults, and as it is stated."""
    origin = str(folder / "config.json")
    family = llava.TOWERS[hf["vision_config"]["model_type"]]
    llava.check_projector(hf, origin)
    tokenizer = load_tokenizer(str(folder))
    if hf["image_token_index"] != tokenizer.image_id:
        raise UserError(
            f"{origin}: image_token_index is {hf['image_token_index']}, but <image> is "
            f"{tokenizer.image_id} in the tokenizer; accepted: the same id"
        )
    checkpoint = open_checkpoint(folder)
    spelling = llava.find_prefixes(checkpoint, family)
    decoder, head, vision, _ = spelling
    layer = llava.select_layer(hf, origin) if select_layer is None else select_layer
    text = hf["text_config"] | {"tie_word_embeddings": _tied(stated, head, checkpoint, origin)}
    return Source(
        folder,
        checkpoint,
        llava.checkpoint_rules(spelling, family),
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
    """Whether the head is the embedding, which configs say in either of two places, or not."""
    name = "tie_word_embeddings"
    said = [part[name] for part in (stated, stated["text_config"]) if name in part]
    if wrong := [value for value in said if type(value) is not bool]:
        raise UserError(f"{origin}: {name} is {wrong[0]!r:.80}; accepted: true or false")
    return any(said) if said else f"{head}lm_head.weight" not in checkpoint


def _original(folder: Path, fields: dict[str, Any], select_layer: int | None) -> Source:
    """A checkpoint of the original code: Qwen's names, `mm_projector`, DeepSpeed's experts."""
    checkpoint = open_checkpoint(folder)
    tokenizer = load_tokenizer(str(folder))
    origin = str(folder / "config.json")
    kind = "qwen3" if "qwen3" in fields["model_type"] else "qwen2"
    text = with_defaults(fields | {"model_type": kind}, llava.READ, origin)
    decoder = qwen.decoder_config(text, tokenizer.real_ids, origin)
    llava.check_original(fields, origin)
    decoder = dataclasses.replace(decoder, moe=qwen.deepspeed_moe(fields, checkpoint, origin))
    check_decoder(decoder, origin)
    layer = fields.get("mm_vision_select_layer")
    if layer is not None and (type(layer) is not int or not -1000 <= layer < 0):
        raise UserError(f"{origin}: mm_vision_select_layer is {layer!r:.80}; accepted: one below 0")
    projector = fields.get("image_projector_type") or fields.get("mm_projector_type") or "linear"
    inner = "image_spatial_proj."
    spatial = any(inner in name for name in checkpoint)
    prefix = "model.mm_projector." + (inner if spatial else "")
    return Source(
        folder,
        checkpoint,
        (
            *prefixed(qwen.RULES + qwen.DEEPSPEED_EXPERTS, "model."),
            *qwen.HEAD,
            *prefixed(_projector_rules(projector, origin), prefix),
        ),
        # The tower is given beside it, and must be the same if it is here too.
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
    """Mean and deviation of the pixels, where a processor's config states them."""
    fields = image_processor(folder)
    if "image_mean" in fields and "image_std" in fields:
        origin = f"{folder}: image processor"
        return {key: _three(fields, f"image_{key}", origin) for key in ("mean", "std")}
    return {}


def _three(fields: dict[str, Any], name: str, origin: str) -> tuple[float, ...]:
    check_pixels(fields[name], f"{origin}: {name}", above_zero=name == "image_std")
    return tuple(float(x) for x in fields[name])


def _projector_rules(kind: Any, origin: str) -> Rules:
    try:
        return llava.original_projector(kind if isinstance(kind, str) else repr(kind))
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
