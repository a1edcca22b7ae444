"""Scores of an answer against the wanted, as LongBench (arXiv 2308.14508) has them,
and two of SCBench's (arXiv 2412.10319).

Quirks included: a score is comparable with published ones only if it makes the same
mistakes. Each function maps (prediction, one wanted answer) to [0, 1].
"""

# ruff: noqa: RUF001 - the marks that are dropped look like others.
import difflib
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

CJK_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』"
    "【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)  # fmt: skip
_DROPPED = {
    "en": str.maketrans("", "", string.punctuation),
    "zh": str.maketrans("", "", string.punctuation + CJK_PUNCTUATION),
}
NUMBER = re.compile(r"\d+")
LABELS = {
    "en": re.compile(r"Paragraph (\d+)"),
    "zh": re.compile(r"段落(\d+)"),
}
Segment = Callable[[str], Sequence[str]]
_EPSILON = 1e-8


def normalize(text: str) -> str:
    """Lowercase words without ASCII punctuation and without a, an, the (SQuAD's)."""
    words = text.lower().translate(_DROPPED["en"])
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", words).split())


def normalize_zh(text: str) -> str:
    """Lowercase characters without ASCII and CJK punctuation and without spaces."""
    return "".join(text.lower().translate(_DROPPED["zh"]).split())


def segment(text: str) -> Sequence[str]:
    """Words of a Chinese text by `jieba` where it is installed, else characters."""
    try:
        import jieba
    except ImportError:
        return list(text)
    return list(jieba.cut(text, cut_all=False))


def segmenter() -> str:
    """What `segment` uses here; scores of the two kinds are not comparable."""
    try:
        import jieba  # noqa: F401
    except ImportError:
        return "characters"
    return "jieba"


def _f1(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    common = sum((Counter(predicted) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def qa_f1(prediction: str, wanted: str) -> float:
    """Overlap of the bags of normalised words."""
    return _f1(normalize(prediction).split(), normalize(wanted).split())


def qa_f1_zh(prediction: str, wanted: str, *, words: Segment = segment) -> float:
    """Overlap of the bags of normalised Chinese words."""
    bags = [
        [word for part in words(text) if (word := normalize_zh(part))]
        for text in (prediction, wanted)
    ]
    return _f1(*bags)


def rouge(prediction: str, wanted: str) -> float:
    """Summary-level ROUGE-L f of the `rouge` 1.0.1 package, its set semantics.

    Both texts are cut at every full stop; the union over wanted sentences of the words
    of their longest common subsequences with any predicted sentence is a set, and so
    are the words it is divided by. A text without words scores 0.
    """
    found, ours = _sentences(wanted), _sentences(prediction)
    if not found or not ours:
        return 0.0
    reference = {word for sentence in found for word in sentence}
    written = {word for sentence in ours for word in sentence}
    union: set[str] = set()
    for sentence in found:
        for other in ours:
            union.update(_common(sentence, other))
    recall, precision = len(union) / len(reference), len(union) / len(written)
    return 2 * (precision * recall / (precision + recall + _EPSILON))


def _sentences(text: str) -> list[list[str]]:
    """The words of each piece between full stops; pieces of length 0 are left out."""
    pieces = [" ".join(piece.split()) for piece in text.split(".") if piece]
    return [piece.split(" ") for piece in pieces]


def _common(left: Sequence[str], right: Sequence[str]) -> list[str]:
    """A longest common subsequence, ties broken as the package breaks them."""
    table = _lengths(left, right)
    found, i, j = [], len(left), len(right)
    while i and j:
        if left[i - 1] == right[j - 1]:
            found.append(left[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def _lengths(left: Sequence[str], right: Sequence[str]) -> list[list[int]]:
    """[i][j]: length of a longest common subsequence of the first i and j words."""
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left, 1):
        for j, b in enumerate(right, 1):
            best = max(table[i - 1][j], table[i][j - 1])
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else best
    return table


def rouge_zh(prediction: str, wanted: str, *, words: Segment = segment) -> float:
    """`rouge` of Chinese texts, their words set apart by spaces."""
    return rouge(" ".join(words(prediction)), " ".join(words(wanted)))


def rouge_lsum(prediction: str, wanted: str) -> float:
    """ROUGE-Lsum f of the `rouge_score` package, without its stemmer.

    Lines are the sentences. Of each wanted line the words of its longest common
    subsequences with all predicted lines count, a word no oftener than either text
    has it.
    """
    found, ours = (
        [re.findall("[a-z0-9]+", line.lower()) for line in text.split("\n") if line]
        for text in (wanted, prediction)
    )
    reference = Counter(word for line in found for word in line)
    written = Counter(word for line in ours for word in line)
    wanted_words, words, hits = reference.total(), written.total(), 0
    for line in found:
        joined = sorted({i for other in ours for i in _common_at(line, other)})
        for word in (line[i] for i in joined):
            if written[word] > 0 and reference[word] > 0:
                hits += 1
                written[word] -= 1
                reference[word] -= 1
    if not hits:
        return 0.0
    precision, recall = hits / words, hits / wanted_words
    return 2 * precision * recall / (precision + recall)


def _common_at(left: Sequence[str], right: Sequence[str]) -> list[int]:
    """Where a longest common subsequence stands in `left`; ties go left last."""
    table = _lengths(left, right)
    found, i, j = [], len(left), len(right)
    while i and j:
        if left[i - 1] == right[j - 1]:
            i, j = i - 1, j - 1
            found.append(i)
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return found


def bleu(prediction: str, wanted: str, *, order: int = 4) -> float:
    """BLEU of words between spaces, smoothed as `nltk`'s method 4 does.

    A count of 0 becomes log(n) / (5 x 2^k) for n predicted words, k counting such
    counts (Chen and Cherry 2014); without a common word the score is 0.
    """
    said, code = prediction.split(), wanted.split()
    logs, missed = [], 0
    for n in range(1, order + 1):
        mine, theirs = (
            Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
            for words in (said, code)
        )
        hits = float((mine & theirs).total())
        if not hits:
            if n == 1 or len(said) < 2:
                return 0.0
            missed += 1
            hits = math.log(len(said)) / (5 * 2**missed)
        logs.append(math.log(hits / max(1, mine.total())))
    short = min(0.0, 1 - len(code) / len(said))
    return math.exp(short + sum(logs) / order)


def classification(prediction: str, wanted: str, classes: Sequence[str]) -> float:
    """1/n if the wanted class is among the n that the prediction names, else 0.

    A class whose name is part of the wanted one's is struck out, and so, since the
    list shrinks while it is walked, the class behind a struck one goes unchecked.
    """
    named = [name for name in classes if name in prediction]
    at = 0
    while at < len(named):
        if named[at] in wanted and named[at] != wanted:
            named.remove(named[at])
        at += 1
    return 1 / len(named) if wanted in named else 0.0


def count(prediction: str, wanted: str) -> float:
    """The share of the numbers in the prediction that are the wanted one."""
    numbers = NUMBER.findall(prediction)
    return sum(n == str(wanted) for n in numbers) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, wanted: str, *, language: str = "en") -> float:
    """`count` against the number of a wanted "Paragraph 7" or its Chinese form."""
    return count(prediction, LABELS[language].findall(wanted)[0])


def code_similarity(prediction: str, wanted: str) -> float:
    """Likeness of the first line that is code, in hundredths as fuzzywuzzy gives it.

    Lines with a backtick, # or // are passed over; difflib's ratio, as where
    python-Levenshtein is not installed.
    """
    lines = prediction.lstrip("\n").split("\n")
    marks = ("`", "#", "//")
    line = next((x for x in lines if not any(m in x for m in marks)), "")
    if line == wanted:
        return 1.0
    if not line or not wanted:
        return 0.0
    ratio = difflib.SequenceMatcher(None, line, wanted).ratio()
    return round(100 * ratio) / 100


def first_line(prediction: str) -> str:
    """The text before the first newline, newlines at the start apart."""
    return prediction.lstrip("\n").split("\n")[0]


def contains_all(prediction: str, wanted: Sequence[str]) -> float:
    """The share of the wanted strings that the prediction holds, in any case."""
    text = prediction.lower()
    return sum(w.lower() in text for w in wanted) / len(wanted)


def contains_any(prediction: str, wanted: Sequence[str]) -> float:
    """1 if the prediction holds any of the wanted strings, in any case."""
    text = prediction.lower()
    return float(any(w.lower() in text for w in wanted))


def subspan_match(prediction: str, wanted: Sequence[str]) -> float:
    """1 if a wanted answer is part of the first line, both normalised.

    Lost in the Middle's (arXiv 2307.03172): what follows the line may copy the context.
    """
    said = normalize(prediction.strip().split("\n")[0])
    return float(any(normalize(w) in said for w in wanted))
