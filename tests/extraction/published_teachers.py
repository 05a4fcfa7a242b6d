"""Small random models of published classes with their processors, and what these predict.

    python -m tests.extraction.published_teachers FAMILY FOLDER RECORDS IMAGES

writes FOLDER/model, and FOLDER/expected.json: of each token of each record's answers its
log-probability, the 4 most probable ids with theirs, and that of all others together, from all
logits of the tokens that the processor makes of messages by itself. Then it extracts from the model
into FOLDER/cache.

It is a process of its own, since processors of videos need torchvision. Its published builds are
for CUDA; next to a torch for CPUs its operators do not load, and a processor needs none of them.
"""

import json
import sys
from pathlib import Path

import torch

_TORCHVISION = Path(sys.prefix) / "torchvision" / "site-packages"  # not what others import
_MISSING = ("nms", "qnms")  # operators that it describes without asking whether they are there
if _TORCHVISION.is_dir():
    sys.path.append(str(_TORCHVISION))
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in _MISSING:
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import transformers as hf  # noqa: E402  after torchvision is found
from PIL import Image  # noqa: E402

from moddistill import extract  # noqa: E402
from tests.data import qwen_ranks  # noqa: E402

IM_END = "<|im_end|>"
TEXT = {
    "vocab_size": 151_700,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}


def template(image: str, before_answer: str = "", system: str = "") -> str:
    """A chat template in `chatml`, with what is in the place of an image."""
    start = "{% for m in messages %}"
    if system:
        start += (
            "{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
            f"{system}<|im_end|>\n{{% endif %}}"
        )
    return (
        start
        + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        + before_answer
        + "{% endif %}"
        "{% for part in m.content %}{% if part.type == 'image' %}"
        + image
        + "{% else %}{{ part.text }}"
        "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def tokenizer(folder: Path, controls: list[str], **names: str):
    """Qwen's tokenizer with the control tokens of a model."""
    qwen_ranks.write_tokenizer_json(folder)
    found = hf.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        eos_token=IM_END,
        pad_token="<|endoftext|>",
        extra_special_tokens=names,
    )
    found.add_special_tokens({"additional_special_tokens": controls})
    return found


_QWEN_VL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def _qwen_ids(tokens) -> dict[str, int]:
    names = ("vision_start", "vision_end", "image", "video")
    ids = tokens.convert_tokens_to_ids(_QWEN_VL)
    return {f"{name}_token_id": id for name, id in zip(names, ids, strict=True)}


def qwen2_vl(folder: Path):
    tokens = tokenizer(folder, _QWEN_VL)
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": MROPE}, vision_config=vision, **_qwen_ids(tokens)
    )
    images = hf.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=16 * 28 * 28)
    chat = template(_QWEN_IMAGE, system="You are a helpful assistant.")
    processor = hf.Qwen2VLProcessor(images, tokens, hf.Qwen2VLVideoProcessor(), chat_template=chat)
    return hf.Qwen2VLForConditionalGeneration(config), processor


def qwen2_5_vl(folder: Path):
    tokens = tokenizer(folder, _QWEN_VL)
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "fullatt_block_indexes": [1],
    }
    config = hf.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": MROPE}, vision_config=vision, **_qwen_ids(tokens)
    )
    images = hf.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=16 * 28 * 28)
    chat = template(_QWEN_IMAGE, system="You are a helpful assistant.")
    videos = hf.Qwen2VLVideoProcessor()
    processor = hf.Qwen2_5_VLProcessor(images, tokens, videos, chat_template=chat)
    return hf.Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl(folder: Path):
    """With the settings of the published image processor."""
    tokens = tokenizer(folder, _QWEN_VL)
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 64,
    }
    rope = MROPE | {"mrope_interleaved": True}
    config = hf.Qwen3VLConfig(
        text_config=TEXT | {"rope_parameters": rope}, vision_config=vision, **_qwen_ids(tokens)
    )
    published = {
        "size": {"longest_edge": 16_777_216, "shortest_edge": 65_536},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    images = hf.Qwen2VLImageProcessor(**published)
    videos = hf.Qwen3VLVideoProcessor()
    processor = hf.Qwen3VLProcessor(images, tokens, videos, chat_template=template(_QWEN_IMAGE))
    return hf.Qwen3VLForConditionalGeneration(config), processor


_SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def llava_onevision(folder: Path):
    tokens = tokenizer(folder, ["<image>", "<video>"])
    image, video = tokens.convert_tokens_to_ids(["<image>", "<video>"])
    grid = [[28, 28], [28, 56], [56, 28]]
    config = hf.LlavaOnevisionConfig(
        text_config=hf.Qwen2Config(**TEXT),
        vision_config=hf.SiglipVisionConfig(**_SIGLIP, vision_use_head=False),
        image_token_id=image,
        video_token_id=video,
        image_grid_pinpoints=grid,
    )
    size = {"height": 28, "width": 28}
    images = hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grid)
    processor = hf.LlavaOnevisionProcessor(
        images,
        tokens,
        hf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=template("<image>\n", before_answer="\n"),
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def internvl(folder: Path):
    names = {"start_image_token": "<img>", "end_image_token": "</img>"}
    names |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    tokens = tokenizer(folder, list(names.values()), **names)
    config = hf.InternVLConfig(
        text_config=hf.Qwen2Config(**TEXT),
        vision_config=_SIGLIP | {"image_size": [28, 28], "patch_size": [14, 14]},
        image_token_id=tokens.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=1,
    )
    images = hf.GotOcr2ImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=True)
    processor = hf.InternVLProcessor(
        images,
        tokens,
        hf.InternVLVideoProcessor(size={"height": 28, "width": 28}),
        image_seq_length=1,
        chat_template=template("<IMG_CONTEXT>\n"),
    )
    return hf.InternVLForConditionalGeneration(config), processor


FAMILIES = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
}


def expected(model, processor, record: dict, images: Path) -> list[tuple]:
    """What is known of each token of the answers, with their ends."""
    turns = record["conversations"]
    read = [Image.open(images / name) for name in record.get("image", ())]
    messages = []
    for turn in turns:
        first, *others = (part.strip("\n") for part in turn["value"].split("<image>"))
        parts = [{"type": "text", "text": first}]
        for text in others:
            parts += [{"type": "image"}, {"type": "text", "text": text}]
        role = {"human": "user", "gpt": "assistant"}[turn["from"]]
        messages.append({"role": role, "content": parts})
    text = processor.apply_chat_template(messages, tokenize=False)
    inputs = processor(text=[text], images=read or None, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits[0, :, : len(processor.tokenizer)]  # the others are padding
        log_p = torch.log_softmax(logits.double(), dim=-1)
    ids, found = inputs["input_ids"][0].tolist(), []
    start = len(ids)
    for turn in reversed(turns[1::2]):  # backwards, since a question may have the same text
        answer = processor.tokenizer(turn["value"] + IM_END)["input_ids"]
        start -= len(answer)
        while ids[start : start + len(answer)] != answer:
            start -= 1
        found.append([known(log_p[start + i - 1], id) for i, id in enumerate(answer)])
    return [token for answer in found[::-1] for token in answer]


def known(log_p: torch.Tensor, label: int) -> tuple[float, list[int], list[float], float]:
    """The log-probability of a label, the 4 most probable ids with theirs, and that of others."""
    logprobs, ids = log_p.topk(4)
    others = log_p.clone()
    others[ids] = -torch.inf
    return log_p[label].item(), ids.tolist(), logprobs.tolist(), others.logsumexp(0).item()


def main(family: str, folder: str, records: str, images: str) -> None:
    out = Path(folder)
    out.mkdir()
    torch.manual_seed(0)
    model, processor = FAMILIES[family](out)
    model.eval().save_pretrained(out / "model")
    processor.save_pretrained(out / "model")
    rows = json.loads(Path(records).read_text())
    known = [expected(model, processor, row, Path(images)) for row in rows]
    (out / "expected.json").write_text(json.dumps(known))
    source = f"--config.data.sources.talks.path={records}"
    extract.main(
        [
            *("--config", "experiments/d2s.py:tiny", "--out", str(out / "cache"), "--top_k", "4"),
            *("--backend", "transformers", f"--config.teacher={out / 'model'}"),
            *(source, f"--config.data.sources.talks.images={images}"),
            *(
                "--config.dtype=float32",
                "--config.data.max_length=512",
                "--config.data.max_images=2",
            ),
        ]
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
