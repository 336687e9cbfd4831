"""Baselines: what can be known of an answer without looking into the model. A claim about vectors must beat them."""

from __future__ import annotations

import numpy as np
import pandas as pd

from storage.probing.probes import Vectors, linear
from storage.probing.score import Bools, Floats
from storage.probing.split import Split

MAJORITY = "majority"
LOGPROBS, ENTROPY = "answer_token_logprobs", "first_token_entropy"


def baseline_scores(frame: pd.DataFrame, wrong: Bools, split: Split) -> dict[str, Floats]:
    """Return each baseline's probability of a wrong answer, fitted on the training side like a probe.

    `frame` has a row per question, as `storage.load` returns it. Baselines whose attributes the parts lack are left out.
    """
    columns = {
        "question length": frame["question"].str.len(),
        "answer length": frame["answer"].str.len(),
    }
    if LOGPROBS in frame:
        columns["mean log-probability"] = frame[LOGPROBS].map(_mean)
    if ENTROPY in frame:
        columns["first-token entropy"] = frame[ENTROPY]
    scores = {MAJORITY: np.full(len(frame), float(wrong[split.train].mean()))}
    for name, column in columns.items():
        values: Vectors = np.asarray(column, np.float32)
        if np.isfinite(values).all():
            scores[name] = linear(values[:, None], wrong, split)
    scores["question words"] = _words(frame["question"], wrong, split)
    return scores


def _mean(logprobs: object) -> float:
    values = np.asarray(logprobs, np.float64).ravel()
    return float(values.mean()) if values.size else float("nan")


def _words(questions: pd.Series[str], wrong: Bools, split: Split) -> Floats:
    """Score by the question's words alone: some kinds of question are harder, whatever the model thinks of this one."""
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(binary=True, max_features=1000, token_pattern=r"(?u)\b\w+\b")
    try:
        counter.fit(questions.iloc[split.train])
    except ValueError:  # no question has a word
        return np.full(len(questions), float(wrong[split.train].mean()))
    return linear(counter.transform(questions).toarray().astype(np.float32), wrong, split)
