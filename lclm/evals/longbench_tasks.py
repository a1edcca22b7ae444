"""LongBench's 21 datasets: category, language, new tokens, metric, rules, a prompt.

The prompts are worded here; a folder's own config/dataset2prompt.json and
dataset2maxlen.json take their place, which published figures need.
"""

# ruff: noqa: RUF001 - Chinese marks look like others.
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lclm.evals import metrics

Metric = Callable[[str, str, Sequence[str]], float]

_QA = "Answer the question from the {text} below, in as few words as possible.\n\n"
_ASK = "\n\nQuestion: {input}\nAnswer:"
_ASK_ZH = "\n\n问题：{input}\n回答："
_PASSAGES = _QA.replace("{text}", "passages") + "{context}" + _ASK
_SHOTS = "Go on as the examples do.\n\n{context}\n{input}"


def _plain(score: Callable[[str, str], float]) -> Metric:
    return lambda said, wanted, classes: score(said, wanted)


METRICS: dict[str, Metric] = {
    "qa_f1": _plain(metrics.qa_f1),
    "qa_f1_zh": _plain(metrics.qa_f1_zh),
    "rouge": _plain(metrics.rouge),
    "rouge_zh": _plain(metrics.rouge_zh),
    "classification": metrics.classification,
    "count": _plain(metrics.count),
    "retrieval": _plain(metrics.retrieval),
    "retrieval_zh": lambda said, wanted, classes: metrics.retrieval(
        said, wanted, language="zh"
    ),
    "code_similarity": _plain(metrics.code_similarity),
}


@dataclass(frozen=True)
class Dataset:
    """One dataset. few_shot: the first line counts, and no chat template is put on;
    code goes without a template too.
    """

    category: str
    metric: str
    new_tokens: int
    prompt: str = field(repr=False)
    language: str = "en"
    extended: bool = False
    few_shot: bool = False

    @property
    def chat(self) -> bool:
        """Whether a chat model gets its template."""
        return not self.few_shot and self.category != "code"

    def score(self, said: str, answers: Sequence[str], classes: Sequence[str]) -> float:
        """The best score over the wanted answers."""
        said = metrics.first_line(said) if self.few_shot else said
        return max(METRICS[self.metric](said, a, classes) for a in answers)


_ONE, _MANY, _SUM = "single-document QA", "multi-document QA", "summarisation"
_FEW, _MADE, _CODE = "few-shot", "synthetic", "code"
DATASETS = {
    "narrativeqa": Dataset(
        _ONE, "qa_f1", 128, _QA.replace("{text}", "story") + "{context}" + _ASK
    ),
    "qasper": Dataset(
        _ONE,
        "qa_f1",
        128,
        "Answer the question from the article below, in as few words as possible; "
        'write "unanswerable" if it does not say, and "yes" or "no" where that is '
        "asked.\n\n{context}" + _ASK,
        extended=True,
    ),
    "multifieldqa_en": Dataset(
        _ONE,
        "qa_f1",
        64,
        _QA.replace("{text}", "text") + "{context}" + _ASK,
        extended=True,
    ),
    "multifieldqa_zh": Dataset(
        _ONE,
        "qa_f1_zh",
        64,
        "请根据下文简短回答问题。\n\n{context}" + _ASK_ZH,
        language="zh",
    ),
    "hotpotqa": Dataset(_MANY, "qa_f1", 32, _PASSAGES, extended=True),
    "2wikimqa": Dataset(_MANY, "qa_f1", 32, _PASSAGES, extended=True),
    "musique": Dataset(_MANY, "qa_f1", 32, _PASSAGES),
    "dureader": Dataset(
        _MANY,
        "rouge_zh",
        128,
        "请根据下面的文章回答问题。\n\n{context}" + _ASK_ZH,
        language="zh",
    ),
    "gov_report": Dataset(
        _SUM,
        "rouge",
        512,
        "Summarise the report below on one page.\n\n{context}\n\nSummary:",
        extended=True,
    ),
    "qmsum": Dataset(
        _SUM,
        "rouge",
        512,
        "Below is the transcript of a meeting. Answer the query about it in a few "
        "sentences.\n\n{context}\n\nQuery: {input}\nAnswer:",
    ),
    "multi_news": Dataset(
        _SUM,
        "rouge",
        512,
        "Summarise the news below on one page.\n\n{context}\n\nSummary:",
        extended=True,
    ),
    "vcsum": Dataset(
        _SUM,
        "rouge_zh",
        512,
        "请总结下面的会议记录。\n\n{context}\n\n总结：",
        language="zh",
    ),
    "trec": Dataset(_FEW, "classification", 64, _SHOTS, extended=True, few_shot=True),
    "triviaqa": Dataset(_FEW, "qa_f1", 32, _SHOTS, extended=True, few_shot=True),
    "samsum": Dataset(_FEW, "rouge", 128, _SHOTS, extended=True, few_shot=True),
    "lsht": Dataset(
        _FEW,
        "classification",
        64,
        "请照例判断新闻的类别。\n\n{context}\n{input}",
        language="zh",
        few_shot=True,
    ),
    "passage_count": Dataset(
        _MADE,
        "count",
        32,
        "Some of the paragraphs below occur more than once. How many different "
        "paragraphs are there? Answer with the number only.\n\n{context}\n\nHow many "
        "different paragraphs are there?\nAnswer: ",
        extended=True,
    ),
    "passage_retrieval_en": Dataset(
        _MADE,
        "retrieval",
        32,
        "Below are numbered paragraphs and then an abstract of one of them.\n\n"
        "{context}\n\nAbstract: {input}\n\nWhich paragraph is the abstract of? Answer "
        'as in "Paragraph 3".\nAnswer: ',
        extended=True,
    ),
    "passage_retrieval_zh": Dataset(
        _MADE,
        "retrieval_zh",
        32,
        "下面是编号的段落，以及其中一段的摘要。\n\n{context}\n\n摘要：{input}\n\n"
        "摘要出自哪一段？请照“段落3”的格式回答。\n回答：",
        language="zh",
    ),
    "lcc": Dataset(
        _CODE,
        "code_similarity",
        64,
        "Write the next line of this code.\n{context}Next line:\n",
        extended=True,
    ),
    "repobench-p": Dataset(
        _CODE,
        "code_similarity",
        64,
        "Write the next line of this code.\n{context}{input}Next line:\n",
        extended=True,
    ),
}
BUCKETS = {"0-4k": 4000, "4-8k": 8000, "8k+": None}


def bucket(length: int) -> str:
    """LongBench-E's length bucket of a text of so many words."""
    return next(n for n, end in BUCKETS.items() if end is None or length < end)
