"""The little world of the demo: pictures of real handwritten digits, and questions with exactly one right answer.

    Digits -> draw() -> picture -> ask() -> Example(pictures, question, answer, task)

The digits are scikit-learn's copy of the UCI "optical recognition of handwritten digits" set: 1,797 grey images of
8x8 pixels (E. Alpaydin, C. Kaynak, CC BY 4.0). They are split before any picture is composed, in blocks of ten
neighbours, so that no test digit is ever seen in training. (Both parts come from the same writers: the set does not
say who wrote what.) Everything here is a function of a numpy Generator: same seed, same examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

BLOCK = 10  # neighbours in the set that stay on one side of the split
TEST_EVERY = 6  # every sixth block is for testing: about 300 of the 1,797 digits

GRID = 4  # cells in width and height of a picture
MAX_DIGITS = 4  # in a picture that comes alone
MAX_DIGITS_OF_TWO = 3  # in each picture of a pair
PICTURE_SIZES = ((32, 32), (48, 40), (40, 48), (64, 64), (80, 64))  # (width, height) in pixels
PICTURE_SIZE_ODDS = (0.6, 0.1, 0.1, 0.1, 0.1)

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = ("first", "second", "third", "fourth")


@dataclass(frozen=True, slots=True)
class Digits:
    """One side of the split: images uint8 [N, 8, 8] (0 paper, 255 ink), labels [N], their positions in the set [N]."""

    images: np.ndarray
    labels: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True, slots=True)
class Example:
    """One question about one or two pictures, and its answer."""

    images: tuple[Image.Image, ...]
    question: str
    answer: str
    task: str
    labels: list[list[int]]  # what is written in each picture


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of question: the ways to put it, and its answer from the digits in each picture."""

    questions: tuple[str, ...]
    answer: Callable[[list[list[int]]], str]
    num_images: int = 1


def load_digits() -> tuple[Digits, Digits]:
    """The digits for training and the digits for testing; no digit is in both.

    Raises:
        SystemExit: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load_all  # type: ignore[import-untyped]
    except ImportError as error:
        raise SystemExit(
            "The digits come with scikit-learn, which is not installed: pip install 'vlm-batch[dev]'"
        ) from error
    whole = load_all()
    images = np.rint(whole.images * (255 / 16)).astype(np.uint8)
    positions = np.arange(len(images))
    is_test = positions // BLOCK % TEST_EVERY == TEST_EVERY - 1
    train, test = (Digits(images[side], whole.target[side], positions[side]) for side in (~is_test, is_test))
    if set(train.positions.tolist()) & set(test.positions.tolist()):
        raise AssertionError("a test digit is among the training digits")
    return train, test


def draw(digits: Digits, chosen: list[int], rng: Generator, distort: bool = False) -> Image.Image:
    """A grey picture of the chosen digits (indices into `digits`) from left to right.

    The digits stand on a line, somewhere on a 4x4 grid of cells, with or without blanks between them. Size of the
    picture, exact place, darkness of paper and ink vary; `distort`, for training, varies size and slant of each digit.
    """
    width, height = PICTURE_SIZES[rng.choice(len(PICTURE_SIZES), p=PICTURE_SIZE_ODDS)]
    canvas = np.zeros((height, width), dtype=np.uint8)
    cell_width, cell_height = width // GRID, height // GRID
    columns = sorted(rng.choice(GRID, len(chosen), replace=False).tolist())
    row = rng.integers(GRID)
    for column, index in zip(columns, chosen, strict=True):
        digit = Image.fromarray(digits.images[index])
        digit_width, digit_height = cell_width, cell_height
        if distort:
            digit = slanted(digit, rng)
            digit_width = round(digit_width * rng.uniform(0.88, 1.12))
            digit_height = round(digit_height * rng.uniform(0.88, 1.12))
        digit = digit.resize((digit_width, digit_height), Image.Resampling.BICUBIC)
        # up to an eighth of a cell beside its middle, but inside the picture
        left = column * cell_width + (cell_width - digit_width + rng.integers(-1, 2) * cell_width // 4) // 2
        top = row * cell_height + (cell_height - digit_height + rng.integers(-1, 2) * cell_height // 4) // 2
        left, top = np.clip((left, top), 0, (width - digit_width, height - digit_height)).tolist()
        spot = canvas[top : top + digit_height, left : left + digit_width]
        np.maximum(spot, np.asarray(digit), out=spot)
    paper, ink = rng.uniform(0, 40), rng.uniform(190, 255)
    return Image.fromarray(np.rint(paper + canvas * ((ink - paper) / 255)).astype(np.uint8))


def slanted(digit: Image.Image, rng: Generator) -> Image.Image:
    """Most digits turned, sheared and moved by less than a pixel: 1,500 are few to learn from."""
    if rng.random() < 0.3:
        return digit
    turn, shear = rng.uniform(-0.2, 0.2, size=2)
    move_x, move_y = rng.uniform(-0.6, 0.6, size=2)
    cos, sin = np.cos(turn), np.sin(turn)
    across, down = (cos, sin + shear), (-sin, cos)
    middle = (digit.width - 1) / 2
    matrix = (*across, middle + move_x - middle * sum(across), *down, middle + move_y - middle * sum(down))
    return digit.transform(digit.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


def spaced(digits: list[int]) -> str:
    return " ".join(map(str, digits))


def describe(pictures: list[list[int]]) -> str:
    (digits,) = pictures
    if len(digits) == 1:
        return f"The picture shows the single digit {digits[0]} and nothing else."
    return f"The picture shows the digits {spaced(digits)} from left to right."


def describe_in_detail(pictures: list[list[int]]) -> str:
    (digits,) = pictures
    noun = "digit" if len(digits) == 1 else "digits"
    order = ", ".join(f"the {place} is {digit}" for place, digit in zip(PLACES, digits, strict=False))
    return (
        f"The picture shows {WORDS[len(digits)]} handwritten {noun}: {order}. "
        f"The largest digit is {max(digits)} and the smallest is {min(digits)}."
    )


def which_has_more(pictures: list[list[int]]) -> str:
    first, second = map(len, pictures)
    return "both have the same number" if first == second else "the first" if first > second else "the second"


def read_both(pictures: list[list[int]]) -> str:
    first, second = pictures
    return f"first: {spaced(first)}; second: {spaced(second)}"


TASKS: dict[str, Task] = {
    "read": Task(
        (
            "Which digits are in the picture?",
            "Read the digits from left to right.",
            "What does it say?",
            "Transcribe the digits in this image, separated by spaces, and write nothing else.",
        ),
        lambda pictures: spaced(pictures[0]),
    ),
    "words": Task(
        ("Write the digits as words.", "Spell out the digits in the picture.", "Read the digits aloud, in words."),
        lambda pictures: " ".join(WORDS[digit] for digit in pictures[0]),
    ),
    "count": Task(
        ("How many digits are in the picture?", "Count the digits.", "How many digits can you see in this image?"),
        lambda pictures: str(len(pictures[0])),
    ),
    "first": Task(
        ("What is the first digit?", "Which digit is on the far left?", "Name only the leftmost digit in this image."),
        lambda pictures: str(pictures[0][0]),
    ),
    "last": Task(
        ("What is the last digit?", "Which digit is on the far right?", "Name only the rightmost digit in this image."),
        lambda pictures: str(pictures[0][-1]),
    ),
    "largest": Task(
        ("Which digit is the largest?", "What is the largest digit in the picture?", "Name the biggest digit."),
        lambda pictures: str(max(pictures[0])),
    ),
    "describe": Task(("Describe the picture.", "What does the image show?", "Write a caption."), describe),
    "detail": Task(
        ("Describe the picture in detail.", "Write a long caption.", "Tell me everything about this image."),
        describe_in_detail,
    ),
    "which_has_more": Task(
        ("Which picture has more digits?", "Which of the two images shows more digits?", "Where are more digits?"),
        which_has_more,
        num_images=2,
    ),
    "same_number": Task(
        (
            "Do both pictures have the same number of digits?",
            "Is the number of digits the same in both images?",
            "Same number of digits?",
        ),
        lambda pictures: "yes" if len(pictures[0]) == len(pictures[1]) else "no",
        num_images=2,
    ),
    "read_both": Task(
        ("Read the digits in both pictures.", "Which digits are in each of the two images?", "Read both."),
        read_both,
        num_images=2,
    ),
}


def pictures_of(
    digits: Digits, num_images: int, rng: Generator, distort: bool = False
) -> tuple[tuple[Image.Image, ...], list[list[int]]]:
    """Pictures of random digits, and what is written in each."""
    most = MAX_DIGITS if num_images == 1 else MAX_DIGITS_OF_TWO
    counts = [int(rng.integers(1, most + 1)) for _ in range(num_images)]
    if num_images == 2 and rng.random() < 0.2:
        counts[1] = counts[0]  # so that about half of all pairs have the same number
    chosen = [rng.integers(0, len(digits.labels), count).tolist() for count in counts]
    labels = [[int(digits.labels[index]) for index in picture] for picture in chosen]
    return tuple(draw(digits, picture, rng, distort) for picture in chosen), labels


def ask(task: str, images: tuple[Image.Image, ...], labels: list[list[int]], rng: Generator) -> Example:
    """One of the task's questions about these pictures."""
    questions = TASKS[task].questions
    question = questions[rng.integers(len(questions))]
    return Example(images, question, TASKS[task].answer(labels), task, labels)


def example(digits: Digits, rng: Generator, task: str, distort: bool = False) -> Example:
    """A question of the task about new pictures."""
    images, labels = pictures_of(digits, TASKS[task].num_images, rng, distort)
    return ask(task, images, labels, rng)


def another(known: Example, rng: Generator) -> Example:
    """A question of another task about the same pictures."""
    names = [name for name, task in TASKS.items() if task.num_images == len(known.images) and name != known.task]
    return ask(names[rng.integers(len(names))], known.images, known.labels, rng)


def conversation(images: tuple[Image.Image, ...], *turns: str, system: str | None = None) -> list[dict[str, Any]]:
    """The messages of a chat: turns are user, assistant, user ... texts; the pictures come before the first."""
    messages: list[dict[str, Any]] = []
    if system is not None:
        messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
    for number, text in enumerate(turns):
        pictures = [{"type": "image"} for _ in images] if number == 0 else []
        role = "assistant" if number % 2 else "user"
        messages.append({"role": role, "content": [*pictures, {"type": "text", "text": text}]})
    return messages
