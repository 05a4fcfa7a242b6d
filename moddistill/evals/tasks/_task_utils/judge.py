"""Verdicts of a judge: any endpoint that speaks OpenAI's chat completions.

Verdicts are appended to a file as they come, so that none is lost or asked for twice. What the
judge did not answer stays without a verdict, until the next call asks for it again.
"""

import dataclasses
import functools
import hashlib
import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from moddistill.evals.tasks._task_utils.errors import TaskError

_LOG = logging.getLogger(__name__)
_NUMBERS = {"timeout": (float, 86_400), "tries": (int, 100), "workers": (int, 1_000)}
_FINAL = frozenset({400, 401, 403, 404, 405, 413, 422})  # statuses that a retry does not change


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """An endpoint and how it is asked.

    Attributes:
      base_url: what precedes `/chat/completions`, such as `http://localhost:8000/v1`.
      model: its name there.
      timeout: seconds for each read of the connection.
      tries: requests for one verdict, each a while after the one before.
      workers: requests at a time.
    """

    base_url: str
    model: str
    key: str = ""
    timeout: float = 60.0
    tries: int = 3
    pause: float = 1.0
    workers: int = 8

    @classmethod
    def from_environment(cls) -> "Judge | None":
        """Returns the judge of `JUDGE_BASE_URL`, `JUDGE_MODEL`, `JUDGE_API_KEY` and so on.

        None without `JUDGE_BASE_URL`: a key that is set for other programs costs nothing here.

        Raises:
          TaskError: no `JUDGE_MODEL`, or a value that is no address or no number in its range.
        """
        if not (base_url := os.environ.get("JUDGE_BASE_URL")):
            return None
        if not base_url.startswith(("http://", "https://")):
            raise TaskError(f"$JUDGE_BASE_URL: expected http:// or https://, got {base_url!r}")
        if not (model := os.environ.get("JUDGE_MODEL")):
            raise TaskError("$JUDGE_MODEL: expected the name of a model with $JUDGE_BASE_URL")
        numbers = {
            name: _number(f"JUDGE_{name.upper()}", kind, most)
            for name, (kind, most) in _NUMBERS.items()
            if os.environ.get(f"JUDGE_{name.upper()}")
        }
        key = os.environ.get("JUDGE_API_KEY", "")
        return cls(base_url=base_url, model=model, key=key, **numbers)

    def ask(self, prompt: str) -> str:
        """Returns the reply to one user message, at temperature 0.

        Raises:
          OSError, http.client.HTTPException: no reply.
          ValueError: a reply of another form.
        """
        message = {"role": "user", "content": prompt}
        content = {"model": self.model, "messages": [message], "temperature": 0}
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            f"{self.base_url.rstrip('/')}/chat/completions", json.dumps(content).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            reply = json.loads(response.read())
        try:
            text = reply["choices"][0]["message"]["content"]
        except (TypeError, LookupError):
            text = None
        if not isinstance(text, str):
            raise ValueError("expected choices[0].message.content")
        return text


def _number(variable: str, kind: type, most: int) -> Any:
    text = os.environ[variable]
    try:
        value = kind(text)
    except ValueError:
        raise TaskError(f"${variable}: expected a number, got {text!r}") from None
    if not 0 < value <= most:  # NaN is not either
        least = "1" if kind is int else "more than 0"
        raise TaskError(f"${variable}: expected {least} to {most:,}, got {text!r}")
    return value


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A reply of the judge, and the rating in it."""

    review: str
    rating: int


def verdicts(
    judge: Judge,
    prompts: tuple[str, ...],
    rating: re.Pattern[str],
    path: Path,
) -> list[Verdict | None]:
    """Returns a verdict for each prompt: stored, or asked for now and stored.

    Args:
      rating: its group is the rating in a reply; a reply without one rating is no verdict.
      path: a line is appended for every verdict.
    """
    stored = dict(_read(path))
    keys = [_key(judge.model, prompt) for prompt in prompts]
    missing = {key: text for key, text in zip(keys, prompts, strict=True) if key not in stored}
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    with ThreadPoolExecutor(judge.workers) as pool, path.open("a") as file:
        asked = {pool.submit(_decide, judge, text, rating): key for key, text in missing.items()}
        for future in as_completed(asked):
            found = future.result()
            if isinstance(found, str):
                failures.append(found)
                continue
            stored[asked[future]] = found
            row = {"key": asked[future], "judge": judge.model, **dataclasses.asdict(found)}
            file.write(f"\n{json.dumps(row)}")  # first, to end a line that was written in part
            file.flush()
    if failures:
        _LOG.warning(
            "%d of %d answers have no verdict; the same command asks again; the last failure: %s",
            len(failures),
            len(prompts),
            failures[-1],
        )
    return [stored.get(key) for key in keys]


# Every metric of a task needs the same verdicts; a judge that does not answer is asked once. The
# arguments are values, since lmms-eval executes `utils.py` again for each of its functions.
verdicts_once = functools.lru_cache(maxsize=1)(verdicts)


def _decide(judge: Judge, prompt: str, rating: re.Pattern[str]) -> Verdict | str:
    """Returns a verdict, or why there is none after the last try."""
    reason = ""
    for attempt in range(judge.tries):
        if attempt:
            time.sleep(judge.pause * 2 ** (attempt - 1))
        try:
            review = judge.ask(prompt)
        except urllib.error.HTTPError as error:
            reason = str(error)
            if error.code in _FINAL:
                break
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            if len(ratings := set(rating.findall(review))) == 1:
                return Verdict(review, int(ratings.pop()))
            reason = f"{len(ratings) or 'no'} ratings in the reply {review[:80]!r}"
    return reason


def _key(model: str, prompt: str) -> str:
    return hashlib.sha256(f"{model}\n{prompt}".encode()).hexdigest()


def _read(path: Path) -> Iterator[tuple[str, Verdict]]:
    """Yields stored verdicts; a line that was written in part is asked for again."""
    if not path.is_file():
        return
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            yield row["key"], Verdict(row["review"], row["rating"])
        except (ValueError, TypeError, LookupError):
            continue
