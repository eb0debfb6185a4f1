"""bleu, chrf, rouge_l and cider: longer answers."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF
from values import PIX2STRUCT, PIX2STRUCT_REFERENCES, row_scores, value

from pipeline.score import METRICS, Cases, UnusableCase
from pipeline.score.caption_words import caption_words

WORDS = [
    "a",
    "the",
    "dog",
    "is",
    "on",
    "red",
    "house,",
    "street.",
    "sit!",
    "don't",
    "3.5",
    "caf\u00e9",
    "\u4e2d\u6587",
    "&",
]


def sentences(num: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(0, 14))) for _ in range(num)]


def columns(references: list[list[str]]) -> list[list[str | None]]:
    """As sacrebleu wants them: the first references of all, the second ..."""
    most = max(map(len, references))
    return [[right[place] if place < len(right) else None for right in references] for place in range(most)]


ANSWERS = sentences(1300, 1)
SEVERAL = [[text or "x" for text in sentences(1 + number % 5, 100 + number)] for number in range(1300)]


def test_bleu_of_the_published_case() -> None:
    """mjpost/sacrebleu, test/test_bleu.py, test_corpus_bleu: the example of its README, and no text at all."""
    references = [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ]
    answers = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    assert value("bleu", answers, references) == pytest.approx(48.530827, abs=1e-6)
    assert value("bleu", [None, "", ""], references) == 0


def test_bleu_is_that_of_sacrebleu_over_a_corpus_and_of_each_record() -> None:
    assert value("bleu", ANSWERS, SEVERAL) == pytest.approx(BLEU().corpus_score(ANSWERS, columns(SEVERAL)).score)
    alone = BLEU(effective_order=True)
    expected = [alone.sentence_score(*case).score for case in zip(ANSWERS, SEVERAL, strict=True)]
    assert row_scores("bleu", ANSWERS, SEVERAL) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("this is a fest", "this is a test"),
        ("this is a test", "this is a test"),
        ("a b", "a b"),
        ("x y z w", "a b c d"),
    ],
)
def test_bleu_of_few_words_is_smoothed_as_by_sacrebleu(answer: str, reference: str) -> None:
    assert value("bleu", [answer], [[reference]]) == pytest.approx(BLEU().corpus_score([answer], [[reference]]).score)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Niemand hat die Absicht, eine Mauer zu errichten", "Niemand hat die Absicht, eine Mauer zu errichten", 100),
        ("a b c", "abc", 100),
        ("", "reference", 0),
    ],
)
def test_chrf_of_the_published_cases(answer: str, reference: str, expected: float) -> None:
    """mjpost/sacrebleu, test/test_chrf.py: those whose value does not hang on beta."""
    assert value("chrf", [answer], [[reference]]) == pytest.approx(expected)


def test_chrf_is_that_of_sacrebleu_over_a_corpus_and_of_each_record() -> None:
    assert value("chrf", ANSWERS, SEVERAL) == pytest.approx(CHRF().corpus_score(ANSWERS, columns(SEVERAL)).score)
    expected = [CHRF().sentence_score(*case).score for case in zip(ANSWERS, SEVERAL, strict=True)]
    assert row_scores("chrf", ANSWERS, SEVERAL) == pytest.approx(expected)


def test_rouge_l_of_the_published_examples() -> None:
    """huggingface/evaluate, metrics/rouge/README.md: [0.5, 0.0] for the words in common here; and rouge-score's
    "testing one two" against "testing", F-measure 1/2."""
    assert row_scores("rouge_l", ["hello there", "general kenobi"], [["hello there"], ["general kenobi"]]) == [1, 1]
    found = row_scores("rouge_l", ["hello goodbye", "ankh morpork"], [["goodbye"], ["general kenobi"]])
    assert found == pytest.approx([2 / 3, 0])
    assert value("rouge_l", ["testing"], [["one two three", "testing one two"]]) == pytest.approx(0.5)


@pytest.mark.slow  # for the import of nltk, which rouge-score asks for
def test_rouge_l_is_that_of_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    expected = [
        scorer.score_multi(right, answer)["rougeL"].fmeasure
        for answer, right in zip(ANSWERS[:250], SEVERAL, strict=False)
    ]
    assert row_scores("rouge_l", ANSWERS[:250], SEVERAL[:250]) == pytest.approx(expected)
    assert sum(expected) > 40


def test_cider_of_the_published_case_of_pix2struct() -> None:
    """Its value hangs on the tokens of the Penn Treebank: do n't, 100 %."""
    assert value("cider", PIX2STRUCT, PIX2STRUCT_REFERENCES) == pytest.approx(1.286, abs=5e-4)


def test_cider_of_the_published_case_of_aac_metrics() -> None:
    """Labbeti/aac-metrics, README.md: cider_d of coco-caption's code and its Java tokenizer."""
    answers = ["a man is speaking", "rain falls"]
    references = [
        ["a man speaks.", "someone speaks.", "a man is speaking while a bird is chirping in the background"],
        ["rain is falling hard on a surface"],
    ]
    assert value("cider", answers, references) == pytest.approx(0.9614, abs=5e-5)
    assert row_scores("cider", answers, references) == pytest.approx([1.3641, 0.5587], abs=5e-5)


@pytest.mark.parametrize(
    "text",
    [
        "well-\nknown 3.5, a-\n b .5 1,000.-5 e.g. 5-6 ...,,, <skipped>x &quot;a&amp;lt; b&quot;",
        "a\u2003b\x1cc.\u00a0,d \u4e2d\u6587\u3002 -\n- \n",
        "x" * 70 + ", " + "x" * 70 + ",",
        " .a ,b .. . ,, 1.,2 ,3 4. -5- {a|b}~[c]^_`d @/",
    ],
)
def test_bleu_tokenizes_piece_by_piece_what_sacrebleu_tokenizes_as_a_whole(text: str) -> None:
    answers = [f"{text} {text[::-1]}", text]
    references = [[text, text[::-1] + " end"], [text[::-1], f"{text}, and {text}"]]
    expected = BLEU().corpus_score(answers, columns(references))
    sums = METRICS["bleu"].rows(Cases(answers, references)).sum(0)
    assert [*sums] == [expected.sys_len, expected.ref_len, *expected.counts, *expected.totals]


def cider_by_the_formula(answers: list[str], references: list[list[str]]) -> list[float]:
    """CIDEr-D as the paper has it, in dictionaries."""

    def counts(text: str, order: int) -> Counter[tuple[str, ...]]:
        words = text.split()
        return Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))

    scores = [0.0] * len(answers)
    for order in range(1, 5):
        rows = [{ngram for text in right for ngram in counts(text, order)} for right in references]
        frequency = Counter(ngram for row in rows for ngram in row)

        def vector(text: str, order: int, frequency: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
            rarity = {ngram: math.log(len(answers) / max(1, frequency[ngram])) for ngram in counts(text, order)}
            return {ngram: number * rarity[ngram] for ngram, number in counts(text, order).items()}

        for place, (answer, right) in enumerate(zip(answers, references, strict=True)):
            mine = vector(answer, order, frequency)
            for text in right:
                theirs = vector(text, order, frequency)
                common = sum(min(mine.get(ngram, 0), weight) * weight for ngram, weight in theirs.items())
                norms = math.hypot(*mine.values()) * math.hypot(*theirs.values())
                penalty = math.exp(-((len(answer.split()) - len(text.split())) ** 2) / 72)
                scores[place] += 10 / 4 * penalty * common / norms / len(right) if norms else 0
    return scores


def test_cider_is_what_the_formula_gives() -> None:
    rng = random.Random(7)
    answers, *columns_of_three = [
        [" ".join(rng.choices("abcd", k=rng.randint(0, 12))) for _ in range(40)] for _ in range(4)
    ]
    references = [list(right) for right in zip(*columns_of_three, strict=True)]
    expected = cider_by_the_formula(answers, references)
    assert row_scores("cider", answers, references) == pytest.approx(expected)
    assert max(expected) > 1


def test_cider_does_not_hang_on_how_many_records_are_counted_at_once() -> None:
    """1,300 records are two portions; alone, with what was learned from all, each has the same score."""
    metric = METRICS["cider"].learned(SEVERAL)
    together = metric.rows(Cases(ANSWERS, SEVERAL))
    for place in (0, 1023, 1024, 1299):
        assert metric.rows(Cases(ANSWERS[place : place + 1], SEVERAL[place : place + 1]))[0] == together[place]
    assert together.max() > 1


def test_cider_has_to_learn_first() -> None:
    with pytest.raises(ValueError, match="learns from the references first"):
        METRICS["cider"].rows(Cases(["a"], [["a"]]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man's dog, it isn't HIS!", ["a", "man", "'s", "dog", "it", "is", "n't", "his"]),
        ("They cannot; we\u2019re 2 o'clock", ["they", "can", "not", "we", "'re", "2", "o'clock"]),
        ("100% of 1,000.5 at 10:30 - (well-known)", ["100", "%", "of", "1,000.5", "at", "10:30", "well-known"]),
        ("the 10th and 2nd, 3x4", ["the", "10th", "and", "2nd", "3x4"]),
        ("U.S. \u201cquoted\u201d ... $5 & #1", ["u.s.", "quoted", "$", "5", "&", "#", "1"]),
        ("\u72ac caf\u00e9 _", ["\u72ac", "caf\u00e9"]),
        ("", []),
    ],
)
def test_words_of_captions(text: str, words: list[str]) -> None:
    assert caption_words(text) == words


@pytest.mark.parametrize("name", ["bleu", "chrf", "rouge_l", "cider"])
def test_odd_texts_have_a_score(name: str) -> None:
    answers = ["", " \n", "\ud800", "\U0001f600" * 3, "x" * 50_000, "a " * 20_000, None, "\u0000"]
    scores = row_scores(name, answers, [["", "a b"]] * len(answers))
    assert all(0 <= score <= METRICS[name].best for score in scores)
    assert value(name, answers, [[""]] * len(answers)) >= 0
    assert METRICS[name].learned([]).rows(Cases([], [])).shape[0] == 0


@pytest.mark.parametrize("name", ["bleu", "chrf", "cider"])
def test_too_many_references_are_refused(name: str) -> None:
    with pytest.raises(UnusableCase, match="at most 63 references for a record, came 64") as caught:
        value(name, ["a", "a"], [["a"], ["a"] * 64])
    assert caught.value.position == 1


def test_an_unanswered_record_costs_length_in_bleu_and_chrf() -> None:
    whole = ["a red bus on the street"] * 3
    references = [[text] for text in whole]
    for name in ("bleu", "chrf", "rouge_l"):
        metric = METRICS[name]
        assert value(name, whole, references) == pytest.approx(metric.best)
        assert value(name, [*whole[:2], None], references) < 0.9 * metric.best
    assert np.isfinite(value("cider", [None], [["a"]]))
