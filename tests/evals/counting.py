"""A task with zero, one or two images per question, and short answers."""

import json

from moddistill.evals.task import Column, Question, Task, exact_match


def questions(data):
    return [
        Question(
            id=record["id"],
            prompt=record["prompt"],
            images=tuple(str(data / image) for image in record["images"]),
            answers=tuple(record["answers"]),
        )
        for record in json.loads((data / "questions.json").read_text())
    ]


def score(rows):
    images = sum(len(row["images"]) for row in rows)
    return {"exact": sum(map(exact_match, rows)) / len(rows), "images": images, "hidden": 0.5}


TASK = Task(
    questions=questions,
    score=score,
    is_correct=exact_match,
    max_new_tokens=3,
    columns=(Column("exact", "Exact", ".1%"), Column("images", "Images", ",")),
    note="Shares of exact answers & the number of images.",
)
