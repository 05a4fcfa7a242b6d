"""Models of the page."""

import pytest

from moddistill.convert.resolve import load
from moddistill.data.tokenizer import load_tokenizer
from moddistill.explorer.models import ExploredModel


@pytest.fixture(scope="session")
def explored(tiny_models):
    """`explored(name, context=512)`: a model of `tiny_models`, on the page under its name."""

    def make(name, context=512):
        model, params = load(tiny_models[name], stacked=False)
        return ExploredModel(
            title=name,
            model=model,
            params=params,
            tokenizer=load_tokenizer(str(tiny_models[name])),
            context=context,
        )

    return make
