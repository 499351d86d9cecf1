"""LongBench's prompts, split into fixed context and user input, with each task's metric and longest answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """Templates for what comes before the question and for the question.

    Attributes:
        context: has `{context}`.
        question: may have `{input}`.
        metric: a key of `squeezed.evaluation.metrics.METRICS`.
    """

    context: str
    question: str
    metric: str
    max_new_tokens: int


_ANSWER_ONLY = "Only give me the answer and do not output any other words."
_PASSAGES = Task(
    f"Answer the question based on the given passages. {_ANSWER_ONLY}\n\nThe following are given passages.\n"
    f"{{context}}\n\nAnswer the question based on the given passages. {_ANSWER_ONLY}",
    "Question: {input}\nAnswer:",
    "qa_f1",
    32,
)
_STORY = "asconcisely as you can, using a single phrase if possible. Do not provide any explanation."  # sic
_ARTICLE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.'
)

TASKS = {
    "narrativeqa": Task(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        f"{_STORY}\n\nStory: {{context}}\n\nNow, answer the question based on the story {_STORY}",
        "Question: {input}\n\nAnswer:",
        "qa_f1",
        128,
    ),
    "qasper": Task(
        f"You are given a scientific article and a question. Answer the question {_ARTICLE}\n\n"
        f"Article: {{context}}\n\n Answer the question based on the above article {_ARTICLE}",
        "Question: {input}\n\nAnswer:",
        "qa_f1",
        128,
    ),
    "multifieldqa_en": Task(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.",
        "Question: {input}\nAnswer:",
        "qa_f1",
        64,
    ),
    "hotpotqa": _PASSAGES,
    "2wikimqa": _PASSAGES,
    "musique": _PASSAGES,
    "gov_report": Task(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}",
        "Now, write a one-page summary of the report.\n\nSummary:",
        "rouge_l",
        512,
    ),
    "qmsum": Task(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript "
        "in one or more sentences.",
        "Query: {input}\nAnswer:",
        "rouge_l",
        512,
    ),
    "multi_news": Task(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}",
        "Now, write a one-page summary of all the news.\n\nSummary:",
        "rouge_l",
        512,
    ),
    "trec": Task(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}",
        "{input}",
        "classification_first_line",
        64,
    ),
    "triviaqa": Task(
        f"Answer the question based on the given passage. {_ANSWER_ONLY} The following are some examples.\n\n"
        "{context}",
        "{input}",
        "qa_f1_first_line",
        32,
    ),
    "samsum": Task(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}",
        "{input}",
        "rouge_l_first_line",
        128,
    ),
    "lcc": Task(
        "Please complete the code given below. \n{context}",
        "Next line of code:\n",
        "code_similarity",
        64,
    ),
    "repobench-p": Task(
        "Please complete the code given below. \n{context}",
        "{input}Next line of code:\n",
        "code_similarity",
        64,
    ),
    "passage_retrieval_en": Task(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n{context}",
        "The following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that the abstract is "
        'from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
        "retrieval",
        32,
    ),
}
