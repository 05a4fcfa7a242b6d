import dataclasses
import json

import numpy as np
import pytest
import tokenizers

from moddistill.convert.resolve import load, resolve
from moddistill.data.token_texts import TokenTexts
from moddistill.data.tokenizer import Tokenizer, train_bpe
from moddistill.storage.model_folder import save_model
from moddistill.teachers import live
from moddistill.teachers.alignment import id_map, shared_ids
from moddistill.teachers.targets import NO_ID


def random_words():
    letters = np.random.default_rng(0).integers(ord("a"), ord("z"), (300, 5))
    return [" ".join("".join(map(chr, word)) for word in letters)] * 2


def test_teacher_with_another_vocabulary_is_refused(
    tiny_config, tiny_architecture, tiny_models, tokenizer, tmp_path
):
    """As many ids, but not the same ones."""
    other = train_bpe(random_words(), tokenizer.image_id)
    assert other.real_ids == tokenizer.real_ids
    params = load(tiny_models["teacher"])[1]
    save_model(tmp_path / "teacher", tiny_architecture("tiny-teacher"), params, other, {})
    config = tiny_config("d2d", teacher=str(tmp_path / "teacher"))
    message = r"^vocabulary of .*: expected the student's id \w+ for token '.*', got \w+$"
    with pytest.raises(ValueError, match=message):
        live.teacher_architecture(
            config, resolve(config.teacher), tiny_architecture(), other, tokenizer
        )


def with_token(tokenizer, token):
    """The tokenizer with one more control token after `<image>`."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([token])
    assert backend.token_to_id(token) == tokenizer.image_id + 1
    return Tokenizer(backend)


@pytest.mark.parametrize("more", ["teacher", "student", "both"])
def test_control_token_of_one_side_is_masked_on_both(
    more, tiny_config, tiny_architecture, tiny_models, tokenizer, tmp_path
):
    teacher_tokenizer = tokenizer if more == "student" else with_token(tokenizer, "<pad>")
    student_tokenizer = tokenizer if more == "teacher" else with_token(tokenizer, "<video>")
    config = tiny_architecture("tiny-teacher")
    decoder = dataclasses.replace(config.decoder, real_ids=teacher_tokenizer.real_ids)
    config = dataclasses.replace(config, decoder=decoder)
    save_model(tmp_path / "teacher", config, load(tiny_models["teacher"])[1], teacher_tokenizer, {})
    settings = tiny_config("d2d", teacher=str(tmp_path / "teacher"))
    accepted = live.teacher_architecture(
        settings,
        resolve(settings.teacher),
        tiny_architecture(),
        teacher_tokenizer,
        student_tokenizer,
    )
    assert accepted.decoder.real_ids == ((0, tokenizer.image_id),)


@pytest.mark.parametrize("where", ["teacher", "student"])
def test_token_with_two_ids_is_named_with_both(
    where, tiny_config, tiny_architecture, tiny_models, tokenizer, tmp_path
):
    """The last token is after `<image>` on one side, which has another token in its place."""
    vocab = json.loads(tokenizer.backend.to_str())
    last = tokenizer.image_id - 1
    [token] = [token for token in vocab["added_tokens"] if token["id"] == last]
    token["content"] = "<other>"
    renamed = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(vocab)))
    name = tokenizer.decode([last], skip_special=False)
    other = with_token(renamed, name)
    teacher_tokenizer, student_tokenizer = (
        (other, tokenizer) if where == "teacher" else (tokenizer, other)
    )
    save_model(
        tmp_path / "teacher",
        tiny_architecture("tiny-teacher"),
        load(tiny_models["teacher"])[1],
        teacher_tokenizer,
        {},
    )
    config = tiny_config("d2d", teacher=str(tmp_path / "teacher"))
    ids = (last + 2, last) if where == "teacher" else (last, last + 2)
    message = rf"expected the student's id {ids[1]} for token '<\|im_end\|>', got {ids[0]}$"
    with pytest.raises(ValueError, match=message):
        live.teacher_architecture(
            config,
            resolve(config.teacher),
            tiny_architecture(),
            teacher_tokenizer,
            student_tokenizer,
        )


def test_word_that_only_the_student_has_is_refused(
    tiny_config, tiny_architecture, tiny_models, tokenizer, tmp_path
):
    """Text of the samples may become it, unlike a control token."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_tokens(["<tool_call>"])
    save_model(
        tmp_path / "teacher",
        tiny_architecture("tiny-teacher"),
        load(tiny_models["teacher"])[1],
        tokenizer,
        {},
    )
    config = tiny_config("d2d", teacher=str(tmp_path / "teacher"))
    message = (
        rf"expected the student's id {tokenizer.image_id + 1} for token '<tool_call>', got None"
    )
    with pytest.raises(ValueError, match=message):
        live.teacher_architecture(
            config,
            resolve(config.teacher),
            tiny_architecture(),
            tokenizer,
            Tokenizer(backend),
        )


def test_teacher_with_new_weights_has_the_template_of_the_records(
    tiny_config, tiny_architecture, tokenizer
):
    config = tiny_config("d2d", teacher="random:tiny-teacher", data={"template": "chatml"})
    teacher = resolve(config.teacher, tokenizer)
    student = dataclasses.replace(tiny_architecture(), template="chatml")
    found = live.teacher_architecture(config, teacher, student, tokenizer, tokenizer)
    assert found.template == "chatml"


def test_teacher_may_have_more_added_tokens_and_another_image_token(
    tiny_config, tiny_architecture, tiny_models, tokenizer, tmp_path
):
    """As Qwen2.5 has, compared with Qwen2."""
    fields = json.loads(tokenizer.backend.to_str())
    [image] = [token for token in fields["added_tokens"] if token["content"] == "<image>"]
    image["id"] += 1
    tool = image | {"id": image["id"] - 1, "content": "<tool_call>", "special": False}
    fields["added_tokens"].append(tool)
    fields["added_tokens"].sort(key=lambda token: token["id"])
    other = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(fields)))
    assert other.image_id == tokenizer.image_id + 1
    model = dataclasses.replace(tiny_architecture("tiny-teacher"), image_token_id=other.image_id)
    save_model(tmp_path / "teacher", model, load(tiny_models["teacher"])[1], other, {})
    config = tiny_config("d2d", teacher=str(tmp_path / "teacher"))
    found = live.teacher_architecture(
        config, resolve(config.teacher), tiny_architecture(), other, tokenizer
    )
    assert found.decoder.real_ids == tokenizer.real_ids
    with pytest.raises(ValueError, match="expected the student's id "):
        shared_ids(other, tokenizer, "runs/t")  # of a teacher that reads the student's tokens


def test_a_vocabulary_has_its_own_ids():
    """Two ids have one text: a byte of SentencePiece and a character."""
    texts = TokenTexts([b",", b"a", b",", b"b"], {"</s>": 4}, 4)
    found = id_map(texts, texts)
    assert found.to_student.tolist() == [NO_ID, 1, 2, 3, 4] and found.is_shared
    plain = TokenTexts([b"a"], {}, None)
    assert id_map(plain, plain).to_student.tolist() == [0]


def test_texts_that_only_the_student_has_are_possible_labels():
    """An answer may have them, so that the ids of both are no basis of a loss."""
    more = TokenTexts([b"a", b"b", b"<think>"], {"</s>": 3}, 3)
    less = TokenTexts([b"a", b"b", None], {"</s>": 3}, 3)
    assert not id_map(teacher=less, student=more).is_shared
    assert id_map(teacher=more, student=less).is_shared
    assert id_map(teacher=more, student=less).to_student.tolist() == [0, 1, NO_ID, 3]
