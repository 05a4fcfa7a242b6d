"""The plug-in for lmms-eval, with its own classes (installed without its dependencies)."""

import importlib.metadata
import io

import pytest
from PIL import Image

from moddistill.convert.resolve import load
from moddistill.data.tokenizer import load_tokenizer
from moddistill.errors import UserError
from moddistill.inference import generation
from moddistill.inference.answer import Decoding
from moddistill.inference.generation import answer
from moddistill.inference.prompts import Prompt
from moddistill.inference.sampling import Sampling

pytest.importorskip("torch")
instance = pytest.importorskip("lmms_eval.api.instance")
models = pytest.importorskip("lmms_eval.models")

from moddistill.evals.answer_log import AnswerLog  # noqa: E402
from moddistill.evals.requests import prompt_of  # noqa: E402
from tests.calls import count_calls  # noqa: E402


@pytest.fixture
def docs(image):
    """Documents with 1, 0 and 2 images; the first one's has transparent pixels."""
    pictures = []
    for seed in range(3):
        with Image.open(image(seed)) as picture:
            pictures.append(picture.copy())
    return [
        {"question": "is it red?", "images": [pictures[0].convert("RGBA")]},
        {"question": "what is the sum of two and two?", "images": []},
        {"question": "which one is blue?", "images": pictures[1:]},
    ]


def requests(docs, form, settings):
    """Requests as lmms-eval makes them."""
    made = []
    for number, doc in enumerate(docs):
        place = (number, "task", "test")
        if form == "simple":
            args = (doc["question"], dict(settings), lambda doc: doc["images"], *place)
        else:
            args = (doc["question"], messages, dict(settings), *place)
        made.append(instance.Instance("generate_until", args, number, {
            "task": "task", "doc_id": number, "repeats": 1,
        }))  # fmt: skip
    return made


def messages(doc):
    content = [{"type": "image", "url": image} for image in doc["images"]]
    content.append({"type": "text", "text": doc["question"]})
    return [{"role": "user", "content": content}]


@pytest.fixture(params=["simple", "chat"])
def form(request):
    return request.param


@pytest.fixture
def model(form, tiny_models, docs):
    registered = models.get_model("moddistill", force_simple=form == "simple")
    assert registered.is_simple == (form == "simple")
    made = registered.create_from_arg_string(
        f"model={tiny_models['sparse']}", {"batch_size": 1, "device": None}
    )
    made.task_dict = {"task": {"test": docs}}
    return made


def expected(tiny_models, docs, form, decoding):
    folder = tiny_models["sparse"]
    loaded = (*load(folder), load_tokenizer(str(folder)))
    between = " " if form == "simple" else "\n"
    prompts = []
    for doc in docs:
        images = tuple(image.convert("RGB") for image in doc["images"])
        shown = between.join(["<image>"] * len(images)) + "\n" * bool(images)
        prompts.append(Prompt(shown + doc["question"], images))
    return answer(*loaded, prompts, decoding)


@pytest.mark.slow
def test_answers_are_ours_in_both_forms(model, form, tiny_models, docs):
    settings = {"max_new_tokens": 5, "temperature": 0, "top_p": None, "num_beams": 1}
    found = model.generate_until(requests(docs, form, settings))
    wanted = expected(tiny_models, docs, form, Decoding(max_new_tokens=5))
    assert [each.text for each in found] == [each.text for each in wanted]
    assert [each.token_counts.output_tokens for each in found] == [
        len(each.token_ids) for each in wanted
    ]
    if form == "chat":
        loads = model.expert_load()
        assert [sorted(load) for load in loads] == [["image", "layer", "text"]] * len(loads)
        assert loads and sum(loads[0]["image"]) == pytest.approx(1)
        assert model.expert_load() == []  # of the next answers, of which there are none


@pytest.mark.slow
def test_equal_images_are_read_once(model, form, docs, monkeypatch):
    """Documents have copies of an image, as those of lmms-eval do."""
    read = count_calls(monkeypatch, generation, "load_images")
    same = [
        docs[0] | {"question": f"{n}?", "images": [docs[0]["images"][0].copy()]} for n in range(12)
    ]
    model.task_dict = {"task": {"test": [*same, docs[2]]}}
    found = model.generate_until(requests([*same, docs[2]], form, {"max_new_tokens": 2}))
    assert len(found) == 13
    assert len(read) == 2


@pytest.mark.slow
def test_settings_of_requests_are_followed(model, form, tiny_models, docs):
    """Each group of equal settings by itself; a stop text as in `until`."""
    hot = {"max_new_tokens": 6, "temperature": 1.5, "top_p": 0.9, "do_sample": True}
    [whole] = expected(tiny_models, docs[:1], form, Decoding(max_new_tokens=8))
    stop = whole.text[2:4]
    mixed = [
        *requests(docs, form, hot),
        *requests(docs[:1], form, {"max_new_tokens": 8, "until": ["never", stop]}),
    ]
    *sampled, stopped = [each.text for each in model.generate_until(mixed)]
    sampling = Sampling(temperature=1.5, top_p=0.9)
    wanted = expected(tiny_models, docs, form, Decoding(max_new_tokens=6, sampling=sampling))
    assert sampled == [each.text for each in wanted]
    assert stopped == whole.text[: whole.text.index(stop)].strip()


def test_a_question_that_cannot_be_answered_is_said_after_the_others(model, form, docs, tmp_path):
    model._log = AnswerLog(tmp_path / "answers.jsonl", "model")
    for doc in docs[1:]:
        doc["images"] = [str(tmp_path / "gone.png")]
    message = r"^task: 2 of 3 questions cannot be answered, .* is document 1: .*gone\.png"
    with pytest.raises(UserError, match=message):
        model.generate_until(requests(docs, form, {"max_new_tokens": 5}))
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1


class ReadLater(dict):
    """A document whose image is decoded at each access, the first `sound` times without a fault."""

    def __init__(self, doc, whole, damaged, sound):
        super().__init__(doc)
        self.contents = [whole] * sound + [damaged] * 9

    def __getitem__(self, name):
        if name == "images":
            return [Image.open(io.BytesIO(self.contents.pop(0)))]
        return super().__getitem__(name)


@pytest.mark.parametrize(("damage", "sound"), [("cut", 0), ("chunk", 0), ("size", 0), ("cut", 1)])
def test_an_image_that_cannot_be_decoded_is_said_after_the_others(
    model, form, docs, tmp_path, monkeypatch, damage, sound
):
    """Images are decoded for their digests, and once more when they are needed."""
    Image.effect_noise((400, 400), 90).save(tmp_path / "noise.png")
    whole = damaged = (tmp_path / "noise.png").read_bytes()
    last = whole.rindex(b"IDAT")
    if damage == "cut":
        damaged = whole[: len(whole) // 2]
    elif damage == "chunk":
        damaged = whole[:last] + bytes(4) + whole[last + 4 :]
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    docs[1] = ReadLater(docs[1], whole, damaged, sound)
    message = r"^task: 1 of 3 questions cannot be answered, .* document 1: expected images that can"
    with pytest.raises(UserError, match=message):
        model.generate_until(requests(docs, form, {"max_new_tokens": 5}))


@pytest.mark.slow
def test_greedy_answers_are_taken_from_the_file_that_they_were_added_to(
    model, form, docs, tiny_models, tmp_path
):
    folder, file = tiny_models["sparse"], tmp_path / "answers.jsonl"

    def read(settings, folder=folder):
        made = type(model)(str(folder), answers=str(file))
        made.task_dict = model.task_dict
        found = made.generate_until(requests(docs, form, settings))
        return found, len(file.read_text().splitlines())

    first, lines = read({"max_new_tokens": 5})
    assert lines == 3
    whole = file.read_text().splitlines()
    file.write_text(f"{whole[0]}\n{whole[1]}\n{whole[2][:20]}")  # interrupted in the third one
    assert read({"max_new_tokens": 5}) == (first, 4)
    assert read({"max_new_tokens": 5}) == (first, 4)
    assert read({"max_new_tokens": 6})[1] == 7  # of other settings
    assert read({"max_new_tokens": 5}, tiny_models["dense"])[1] == 10  # of another model
    hot = {"max_new_tokens": 5, "temperature": 1.0}
    assert read(hot)[1] == 10  # a sampled one is always made


def test_a_model_in_memory_says_after_each_answer(model, form, docs):
    calls = []
    live = type(model).of(*model._loaded, on_answer=lambda: calls.append(1))
    live.task_dict = model.task_dict
    asked = [requests(docs, form, {"max_new_tokens": 5}) for _ in range(2)]
    assert live.generate_until(asked[0]) == model.generate_until(asked[1])
    assert len(calls) == 3


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"guidance": 2.0}])
def test_settings_that_cannot_be_followed_are_an_error(model, form, docs, settings):
    with pytest.raises(UserError, match=f"{next(iter(settings))}"):
        model.generate_until(requests(docs, form, settings))


def test_messages_have_a_system_prompt_and_turns():
    def said(role, text):
        return {"role": role, "content": [{"type": "text", "text": text}]}

    talk = [
        said("system", "Be brief."),
        said("user", "a"),
        said("assistant", "b"),
        said("user", "c"),
    ]
    assert prompt_of(talk) == Prompt("c", (), (("a", "b"),), "Be brief.")
    with pytest.raises(UserError, match=r"roles of messages: expected user and assistant in turns"):
        prompt_of(talk[:3])
    with pytest.raises(
        UserError, match="content of a message: expected text or image, got 'video'"
    ):
        prompt_of([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}])


def test_the_entry_point_names_the_manifest():
    [entry] = importlib.metadata.entry_points(group="lmms_eval.models", name="moddistill")
    assert entry.load()().model_id == "moddistill"
