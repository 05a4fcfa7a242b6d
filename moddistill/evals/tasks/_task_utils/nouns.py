"""Words and nouns of English texts, by NLTK as AMBER's and CHAIR's publishers find them.

NLTK is a dependency of lmms-eval; spaCy and its vectors are needed by AMBER only.
"""

import functools
from typing import Any

from moddistill.evals.tasks._task_utils.errors import TaskError

_DATA = ("punkt_tab", "averaged_perceptron_tagger_eng", "wordnet")


def singular_words(text: str) -> list[str]:
    """Returns the tokens of a text in lower case, each in the singular if it is a plural noun."""
    import nltk  # noqa: PLC0415  takes seconds

    lemmatize = nltk.stem.WordNetLemmatizer().lemmatize
    return [lemmatize(word) for word in nltk.word_tokenize(text.lower())]


def nouns(text: str) -> list[str]:
    """Returns the nouns of a text in the singular, in their order and as often as they occur."""
    import nltk  # noqa: PLC0415

    lemmatize = nltk.stem.WordNetLemmatizer().lemmatize
    tagged = _tagger().tag(nltk.word_tokenize(text))
    return [lemmatize(word) for word, tag in tagged if tag.startswith("NN")]


def load_nltk() -> None:
    """Loads NLTK's data, before threads use them: its lazy loading is not safe there.

    Raises:
      TaskError: NLTK or its data are not installed.
    """
    try:
        singular_words(" ".join(nouns("Words load.")))
    except (ImportError, LookupError, OSError) as error:
        command = f"pip install nltk; python -m nltk.downloader {' '.join(_DATA)}"
        raise TaskError(f"NLTK: expected its data {', '.join(_DATA)}: {command}") from error


class Vectors:
    """Words of a spaCy model, similar where the cosine of their vectors exceeds a threshold.

    Raises:
      TaskError: spaCy or the model is not installed, or has no vectors, as `en_core_web_sm`.
    """

    def __init__(self, model: str, threshold: float):
        try:
            import spacy  # noqa: PLC0415  takes seconds

            language = spacy.load(model)
        except (ImportError, OSError) as error:
            command = f"pip install spacy; python -m spacy download {model}"
            raise TaskError(f"spaCy: expected the model {model!r}: {command}") from error
        if not language.vocab.vectors.size:
            raise TaskError(f"spaCy: expected a model with vectors, got {model!r}")
        # Similarity needs vectors only, so no tagger or parser runs.
        self._document = functools.cache(language.make_doc)
        self._threshold = threshold

    def similar(self, one: str, other: str) -> bool:
        """Returns whether two words are near-synonyms."""
        document = self._document(other)
        # A word without a vector is similar to nothing but itself.
        if not document.vector_norm or not self._document(one).vector_norm:
            return one == other
        return self._document(one).similarity(document) > self._threshold


@functools.cache
def _tagger() -> Any:
    from nltk.tag import PerceptronTagger  # noqa: PLC0415

    return PerceptronTagger()  # nltk.pos_tag would read its weights at every call
