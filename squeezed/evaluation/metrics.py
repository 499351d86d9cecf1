"""Metrics: a prediction and its sample -> 0 to 1. Published figures are these times 100."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType

from squeezed.errors import InputError
from squeezed.evaluation.sample import Sample

Metric = Callable[[str, Sample], float]

_CONTROL = re.compile(r"[\x00-\x1f]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"[^\W_]+(?:[.,'-][^\W_]+)*")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def string_match_all(prediction: str, sample: Sample) -> float:
    """Share of the answers that occur in the prediction, whatever the case (RULER, all but its QA)."""
    text = _printable(prediction)
    return sum(answer.lower() in text for answer in sample.answers) / len(sample.answers)


def string_match_part(prediction: str, sample: Sample) -> float:
    """1 if any of the answers occurs in the prediction, whatever the case (RULER's QA)."""
    text = _printable(prediction)
    return float(any(answer.lower() in text for answer in sample.answers))


def short_answer(prediction: str, sample: Sample) -> float:
    """1 if the words of any answer stand together in the prediction, 38,000 and 38000 alike (PreFixQA, ours).

    Whole words count, so that 16 is not found in 1964. Answers are kept short by `max_new_tokens`: no prediction has
    room to list what is in the text.
    """
    said = f" {' '.join(plain_words(prediction))} "
    return float(any(f" {' '.join(plain_words(answer))} " in said for answer in sample.answers))


def qa_f1(prediction: str, sample: Sample) -> float:
    """Best F1 of the words in common with an answer; case, punctuation and articles do not count (LongBench)."""
    return _best(_word_f1, prediction, sample)


def rouge_l(prediction: str, sample: Sample) -> float:
    """Best ROUGE-L F1 against an answer, as LongBench reckons it (the package `rouge`, 1.0).

    Texts are split into sentences at full stops and into words at spaces, case and punctuation kept. What an answer
    and a prediction have in common is the set of words in the longest common subsequences of any sentence of one with
    any of the other; precision and recall are its size over the number of different words.
    """
    return _best(_sentence_lcs_f1, prediction, sample)


def classification(prediction: str, sample: Sample) -> float:
    """1 / number of labels named, if the right one is among them (LongBench).

    Labels that are part of the right label's own name do not count as named.
    """
    return _best(lambda text, answer: _label_score(text, answer, sample.choices), prediction, sample)


def retrieval(prediction: str, sample: Sample) -> float:
    """Share of the prediction's numbers that are the answer's first number, as in `Paragraph 7` (LongBench)."""
    return _best(_number_share, prediction, sample)


def code_similarity(prediction: str, sample: Sample) -> float:
    """Edit similarity of the prediction's first line of code to the answer (LongBench).

    The first line without a backtick, `#` or `//` counts; the similarity is 1 - insertions and deletions over the
    characters of both.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return _best(lambda text, answer: _rapidfuzz().fuzz.ratio(text, answer) / 100, code, sample)


def on_first_line(metric: Metric) -> Metric:
    """`metric` of the first line, as LongBench scores its few-shot tasks: what follows are more examples."""

    def scored(prediction: str, sample: Sample) -> float:
        return metric(prediction.lstrip("\n").split("\n")[0], sample)

    scored.__doc__ = metric.__doc__
    return scored


METRICS: dict[str, Metric] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
    "short_answer": short_answer,
    "qa_f1": qa_f1,
    "qa_f1_first_line": on_first_line(qa_f1),
    "rouge_l": rouge_l,
    "rouge_l_first_line": on_first_line(rouge_l),
    "classification_first_line": on_first_line(classification),
    "retrieval": retrieval,
    "code_similarity": code_similarity,
}


def plain_words(text: str) -> list[str]:
    """Words and numbers in lower case, without the commas of thousands; what is inside a word stays, as in `it's`."""
    return [_THOUSANDS.sub("", word) for word in _WORD.findall(text.lower().replace("\u2019", "'"))]


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces, as SQuAD's evaluation has it."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _best(score: Callable[[str, str], float], prediction: str, sample: Sample) -> float:
    return max(score(prediction, answer) for answer in sample.answers)


def _printable(prediction: str) -> str:
    return _CONTROL.sub("\n", prediction.strip()).strip().lower()


def _word_f1(prediction: str, answer: str) -> float:
    said, right = normalized(prediction).split(), normalized(answer).split()
    return _f1((Counter(said) & Counter(right)).total(), len(said), len(right))


def _sentence_lcs_f1(prediction: str, answer: str) -> float:
    said = [sentence.split() for sentence in prediction.split(".") if sentence]
    right = [sentence.split() for sentence in answer.split(".") if sentence]
    common = {word for one in right for other in said for word in _common_subsequence(one, other)}
    return _f1(len(common), len({w for one in said for w in one}), len({w for one in right for w in one}))


def _common_subsequence(left: list[str], right: list[str]) -> Iterator[str]:
    blocks = _rapidfuzz().distance.LCSseq.editops(left, right).as_matching_blocks()
    return (word for block in blocks for word in left[block.a : block.a + block.size])


def _rapidfuzz() -> ModuleType:
    try:  # only LongBench needs it
        import rapidfuzz.distance
    except ImportError as error:
        raise InputError(
            "the package rapidfuzz, which this metric uses, is not installed; "
            "run: pip install 'squeezed-attention[evaluation]'"
        ) from error
    return rapidfuzz


def _f1(common: int, said: int, right: int) -> float:
    return 2 * common / (said + right) if common else 0.0


def _label_score(prediction: str, answer: str, choices: tuple[str, ...]) -> float:
    named = [label for label in choices if label in prediction and (label == answer or label not in answer)]
    return 1 / len(named) if answer in named else 0.0


def _number_share(prediction: str, answer: str) -> float:
    right, said = _NUMBER.search(answer), _NUMBER.findall(prediction)
    return said.count(right.group()) / len(said) if right and said else 0.0
