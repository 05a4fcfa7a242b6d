"""Small folders in the form in which the publishers give their files, and a judge on this host."""

import base64
import contextlib
import http.server
import io
import json
import threading
import time

import pytest
from PIL import Image

PROMPT = "Rate.\nContents: {}\nQuestion: {}\nStandard: {}\nResponse: {}\n"


def jpeg(color):
    content = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(content, "JPEG")
    return content.getvalue()


@pytest.fixture
def amber_folder(tmp_path, monkeypatch):
    """Two images to describe and four questions: every kind of `type` but one."""
    folder = tmp_path / "AMBER"
    (folder / "data/query").mkdir(parents=True)
    (folder / "image").mkdir()
    for number in (1, 2):
        (folder / f"image/AMBER_{number}.jpg").write_bytes(jpeg("blue"))
    annotations = [
        {"id": 1, "type": "generative", "truth": ["sky", "person", "table"], "hallu": ["dog"]},
        {"id": 2, "type": "generative", "truth": ["sky"], "hallu": ["bird", "sun"]},
        {"id": 3, "type": "discriminative-attribute-state", "truth": "yes"},
        {"id": 4, "type": "discriminative-attribute-number", "truth": "no"},
        {"id": 5, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 6, "type": "relation", "truth": "yes"},
    ]
    queries = [
        {"id": each["id"], "image": f"AMBER_{1 + each['id'] % 2}.jpg", "query": "Is it so?"}
        for each in annotations
    ]
    for query in queries[:2]:
        query["query"] = "Describe this image."
    relation = {
        "sky": [],
        "person": ["man", "woman"],
        "table": ["desk"],
        "dog": ["puppy"],
        "bird": [],
        "sun": ["sunshine"],
    }
    write = {"annotations": annotations, "query/query_all": queries, "relation": relation}
    for name, content in write.items():
        (folder / f"data/{name}.json").write_text(json.dumps(content))
    (folder / "data/safe_words.txt").write_text("object\nsunshine\n")
    monkeypatch.setenv("AMBER_DIR", str(folder))
    return folder


@pytest.fixture
def halbench_folder(tmp_path, monkeypatch):
    """Two questions about an image of the training set and one of the validation set."""
    folder = tmp_path / "object_halbench"
    (folder / "annotations").mkdir(parents=True)
    lines = [
        {"image": base64.b64encode(jpeg(color)).decode(), "question": question, "image_id": image}
        for color, question, image in (("red", "What is it?", 7), ("blue", "Describe it.", "9"))
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "obj_halbench_300_with_image.jsonl").write_text(content)
    (folder / "synonyms_refine.txt").write_text(
        "person, man, child\ntrain, locomotive\nairplane, jet\nchair, seat\ntoilet\nwine glass\n"
        "tie, bow, bow tie\nbear, panda\nhot dog\n"
    )
    categories = [{"id": 1, "name": "person"}, {"id": 7, "name": "train"}]
    for split, image, category, caption in (
        ("train", 7, 1, "A child on a chair."),
        ("val", 9, 7, "Two locomotives."),
    ):
        instances = [
            {"image_id": image, "category_id": category, "segmentation": []},
            {"image_id": 1000, "category_id": 1, "segmentation": []},
        ]
        path = folder / f"annotations/instances_{split}2014.json"
        path.write_text(json.dumps({"categories": categories, "annotations": instances}))
        captions = [{"image_id": image, "caption": caption}, {"image_id": 1000, "caption": "A."}]
        path = folder / f"annotations/captions_{split}2014.json"
        path.write_text(json.dumps({"annotations": captions}))
    monkeypatch.setenv("OBJECT_HALBENCH_DIR", str(folder))
    return folder


@pytest.fixture
def mmhal_folder(tmp_path, monkeypatch):
    """Three questions of two types."""
    folder = tmp_path / "MMHal-Bench"
    (folder / "images").mkdir(parents=True)
    kinds = ("attribute", "other", "attribute")
    records = [
        {
            "question_type": kind,
            "question_topic": "outdoor",
            "image_id": f"id{number}",
            "image_src": f"https://example.org/8/{number}_o.jpg",
            "image_content": ["Fire hydrant", "Tree"],
            "question": f"Question {number}?",
            "gt_answer": "Yellow.",
            "model_answer": "",
        }
        for number, kind in enumerate(kinds)
    ]
    for number in range(len(kinds)):
        (folder / f"images/{number}_o.jpg").write_bytes(jpeg("yellow"))
    (folder / "response_template.json").write_text(json.dumps(records))
    source = (
        f"import argparse\n\ntemplate = '''{PROMPT}'''\n\nif __name__ == '__main__':\n    1 / 0\n"
    )
    (folder / "eval_gpt4.py").write_text(source)
    monkeypatch.setenv("MMHAL_BENCH_DIR", str(folder))
    return folder


class JudgeServer:
    """An endpoint of chat completions.

    Attributes:
      reply: from a prompt to the text of the answer, a status, the bytes of a body, or seconds of
        silence.
      requests: (headers, body) of each request.
    """

    def __init__(self):
        self.requests = []
        self.reply = lambda prompt: "Fine.\nRating: 5, very informative, no hallucination"

    def serve(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.requests.append((handler.headers, body))
        assert handler.path == "/v1/chat/completions"
        found = self.reply(body["messages"][0]["content"])
        if isinstance(found, float):
            time.sleep(found)
        if isinstance(found, int):
            return handler.send_error(found)
        if not isinstance(found, bytes):
            choice = {"message": {"role": "assistant", "content": found}}
            found = json.dumps({"choices": [choice]}).encode()
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(found)


@pytest.fixture
def judge_server(monkeypatch):
    """A `JudgeServer` that the environment names."""
    served = JudgeServer()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            with contextlib.suppress(ConnectionError):  # of a client that waits no longer
                served.serve(self)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name, value in {
        "BASE_URL": f"http://127.0.0.1:{server.server_port}/v1/",
        "MODEL": "tiny-judge",
        "API_KEY": "secret",
        "TIMEOUT": "30",
        "TRIES": "2",
    }.items():
        monkeypatch.setenv(f"JUDGE_{name}", value)
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _no_judge(monkeypatch):
    """A judge of the environment that tests run in is not asked."""
    monkeypatch.delenv("JUDGE_BASE_URL", raising=False)
