"""Greedy answers of exported folders in `transformers`."""

from pathlib import Path

from PIL import Image
from transformers import AutoProcessor

from tests import torch_or_skip as torch


def answer_in_transformers(
    model, folder: Path, image: Image.Image, question: str, max_new_tokens: int
) -> tuple[list[int], list[int]]:
    """The ids of the prompt, and those generated before the end token."""
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=image, text=text, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens)[0].tolist()
    prompt = inputs["input_ids"][0].tolist()
    generated = ids[len(prompt) :]
    end = model.generation_config.eos_token_id
    return prompt, generated[: generated.index(end)] if end in generated else generated
