"""Models of the page."""

import dataclasses

import pytest

from moddistill.convert.resolve import load
from moddistill.data.tokenizer import load_tokenizer
from moddistill.explorer.models import ExploredModel


@pytest.fixture(scope="session")
def explored(tiny_models):
    """`explored(name, context=0)`: a model of `tiny_models`, on the page under its name."""

    def make(name, context=0):
        model, params = load(tiny_models[name], stacked=False)
        model = model.clone(config=dataclasses.replace(model.config, context=context))
        return ExploredModel(
            title=name,
            model=model,
            params=params,
            tokenizer=load_tokenizer(str(tiny_models[name])),
        )

    return make
