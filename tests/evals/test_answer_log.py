"""Which answers are taken from the log: those that nothing has changed of."""

import itertools

from moddistill.evals.answer_log import AnswerLog
from moddistill.inference.answer import Decoding
from moddistill.inference.prompts import Prompt
from moddistill.inference.sampling import Sampling


def test_keys_differ_by_all_that_an_answer_depends_on():
    asked = ("task", 1), Prompt("a", ("b.png",)), Decoding(max_new_tokens=2)
    place, prompt, decoding = asked
    keys = [
        AnswerLog(None, model).key(*each)
        for model, each in [
            ("one", asked),
            ("two", asked),
            ("one", (("task", 2), prompt, decoding)),
            ("one", (place, Prompt("b", prompt.images), decoding)),
            ("one", (place, Prompt("a"), decoding)),
            ("one", (place, Prompt("a", prompt.images, (("c", "d"),)), decoding)),
            ("one", (place, Prompt("a", prompt.images, (), "Be brief."), decoding)),
            ("one", (place, prompt, Decoding(max_new_tokens=3))),
            ("one", (place, prompt, Decoding(max_new_tokens=2, stop=(".",)))),
            (
                "one",
                (place, prompt, Decoding(max_new_tokens=2, sampling=Sampling(temperature=1.0))),
            ),
        ]
    ]
    assert all(first != second for first, second in itertools.combinations(keys, 2))
    assert AnswerLog(None, "one").key(*asked) == keys[0]
