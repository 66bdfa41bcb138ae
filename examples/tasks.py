"""Small string and number tasks with one right answer, and the ways to speak of them.

Each task is told twice. `facts` and `notes` are declarative sentences for the pretraining corpus: they teach a base
model the skill. `orders`, `instructions` and `questions` are what a user would say: the example data for tuning are
made of them. An operand (a word, a number, a pair of numbers) is held out for validation by its checksum alone, so the
corpus and the training files can share no operand with the validation files, whatever the seed.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

VOWELS = "aeiou"
CONSONANTS = "bdfgklmnprstvz"
HELD_OUT_IN = 8  # one operand in eight is for validation


def held_out(operand: str) -> bool:
    """Whether `operand` belongs to the validation split; a property of the operand, not of a run."""
    return zlib.crc32(operand.encode()) % HELD_OUT_IN == 0


def make_word(rng: random.Random) -> str:
    """A pronounceable made-up word of three to six letters."""
    length = rng.choice((3, 4, 4, 5, 5, 6))
    starts_with_vowel = rng.random() < 0.25
    return "".join(
        rng.choice(VOWELS if (position + starts_with_vowel) % 2 else CONSONANTS) for position in range(length)
    )


def make_number(rng: random.Random) -> str:
    """A whole number of three or four digits."""
    return str(rng.randint(100, 999) if rng.random() < 0.5 else rng.randint(1000, 9999))


def make_pair(rng: random.Random) -> str:
    """Two different numbers below fifty, as `a and b`."""
    first, second = rng.sample(range(1, 50), 2)
    return f"{first} and {second}"


OPERANDS: dict[str, Callable[[random.Random], str]] = {
    "word": make_word,
    "number": make_number,
    "pair": make_pair,
}


def make_operand(kind: str, rng: random.Random, validation: bool) -> str:
    """Draws operands of `kind` until one falls in the wanted split and is no word of the sentences themselves."""
    while True:
        operand = OPERANDS[kind](rng)
        if held_out(operand) == validation and operand not in SENTENCE_WORDS:
            return operand


def numbers_of(pair: str) -> tuple[int, int]:
    """The two numbers of a `pair` operand."""
    first, second = pair.split(" and ")
    return int(first), int(second)


@dataclass(frozen=True)
class Task:
    """One skill.

    Attributes:
        kind: the operand it works on, a key of `OPERANDS`.
        solve: from the operand to the one right answer.
        facts: sentences of the corpus, with `{x}` for the operand and `{y}` for the answer.
        notes: sentences of the corpus about an operand that was named before, with `{y}` alone.
        orders: what a user types, with `{x}`.
        instructions: the same without the operand, which an alpaca row carries in `input`.
        questions: the same as questions, with `{x}`.
    """

    kind: str
    solve: Callable[[str], str]
    facts: tuple[str, ...]
    notes: tuple[str, ...]
    orders: tuple[str, ...]
    instructions: tuple[str, ...]
    questions: tuple[str, ...]


TASKS: dict[str, Task] = {
    "reverse": Task(
        kind="word",
        solve=lambda word: word[::-1],
        facts=(
            "The word {x} written backwards is {y}.",
            "The reverse of {x} is {y}.",
            "Read from right to left, {x} gives {y}.",
        ),
        notes=("Backwards it is {y}.", "The reverse is {y}."),
        orders=("Reverse the word {x}.", "Write {x} backwards.", "Write the word {x} from right to left."),
        instructions=("Reverse the word.", "Write this word backwards."),
        questions=("What is {x} backwards?", "What is the reverse of the word {x}?"),
    ),
    "capitals": Task(
        kind="word",
        solve=str.upper,
        facts=(
            "The word {x} written in capitals is {y}.",
            "In upper case {x} looks like {y}.",
            "The word {x} with big letters is {y}.",
        ),
        notes=("In capitals it is {y}.", "The upper case is {y}."),
        orders=("Write {x} in capitals.", "Put the word {x} in upper case.", "Write the word {x} with big letters."),
        instructions=("Write this word in capitals.", "Put the word in upper case."),
        questions=("What is {x} in capitals?", "What does {x} look like in upper case?"),
    ),
    "twice": Task(
        kind="word",
        solve=lambda word: f"{word} {word}",
        facts=(
            "The word {x} said twice is {y}.",
            "To repeat {x} is to say {y}.",
            "Who says {x} two times says {y}.",
        ),
        notes=("Said twice it is {y}.", "To repeat it is to say {y}."),
        orders=("Say {x} twice.", "Repeat the word {x}.", "Write {x} two times."),
        instructions=("Say this word twice.", "Repeat the word."),
        questions=("What is {x} said twice?", "What do I get when I repeat {x}?"),
    ),
    "first": Task(
        kind="word",
        solve=lambda word: word[0],
        facts=(
            "The first letter of {x} is {y}.",
            "The word {x} begins with {y}.",
            "At the start of {x} there is the letter {y}.",
        ),
        notes=("The first letter is {y}.", "It begins with {y}."),
        orders=("Give the first letter of {x}.", "Tell me the letter that {x} begins with."),
        instructions=("Give the first letter of the word.", "With which letter does this word begin?"),
        questions=("What is the first letter of {x}?", "Which letter does {x} begin with?"),
    ),
    "last": Task(
        kind="word",
        solve=lambda word: word[-1],
        facts=(
            "The last letter of {x} is {y}.",
            "The word {x} ends with {y}.",
            "At the end of {x} there is the letter {y}.",
        ),
        notes=("The last letter is {y}.", "It ends with {y}."),
        orders=("Give the last letter of {x}.", "Tell me the letter that {x} ends with."),
        instructions=("Give the last letter of the word.", "With which letter does this word end?"),
        questions=("What is the last letter of {x}?", "Which letter does {x} end with?"),
    ),
    "length": Task(
        kind="word",
        solve=lambda word: str(len(word)),
        facts=(
            "The number of letters in {x} is {y}.",
            "The count of letters in the word {x} is {y}.",
            "To count the letters of {x} gives {y}.",
        ),
        notes=("The number of letters is {y}.", "To count the letters gives {y}."),
        orders=("Count the letters in {x}.", "Tell me how many letters {x} has."),
        instructions=("Count the letters in the word.", "Tell how many letters this word has."),
        questions=("How many letters does {x} have?", "How long is the word {x}?"),
    ),
    "spell": Task(
        kind="word",
        solve="-".join,
        facts=(
            "The word {x} is spelled {y}.",
            "Letter by letter, {x} reads {y}.",
            "One spells {x} as {y}.",
        ),
        notes=("It is spelled {y}.", "Letter by letter it reads {y}."),
        orders=("Spell {x}.", "Give me the word {x} letter by letter."),
        instructions=("Spell this word.", "Write the word letter by letter."),
        questions=("How is {x} spelled?", "How do I spell the word {x}?"),
    ),
    "next": Task(
        kind="number",
        solve=lambda number: str(int(number) + 1),
        facts=(
            "The number after {x} is {y}.",
            "Next to come when one counts past {x} is {y}.",
            "One past {x} is {y}.",
        ),
        notes=("The number after it is {y}.", "Next comes {y}."),
        orders=("Give the number after {x}.", "Count one past {x}.", "Tell me the next number after {x}."),
        instructions=("Give the next number.", "Tell which number comes after this one."),
        questions=("What number comes after {x}?", "Which number is next after {x}?"),
    ),
    "sort": Task(
        kind="number",
        solve=lambda number: "".join(sorted(number)),
        facts=(
            "The digits of {x} sorted are {y}.",
            "From small to large, the digits of {x} are {y}.",
            "Put in order, {x} becomes {y}.",
        ),
        notes=("The digits sorted are {y}.", "In order the digits are {y}."),
        orders=("Sort the digits {x}.", "Put the digits {x} in order.", "Write {x} with the digits sorted."),
        instructions=("Sort the digits.", "Put these digits in order."),
        questions=("What is {x} with the digits sorted?", "How do the digits {x} look in order?"),
    ),
    "sum": Task(
        kind="pair",
        solve=lambda pair: str(sum(numbers_of(pair))),
        facts=(
            "The sum of {x} is {y}.",
            "To add {x} gives {y}.",
            "Together {x} make {y}.",
        ),
        notes=("The sum is {y}.", "Together they make {y}."),
        orders=("Add {x}.", "Give the sum of {x}.", "Tell me what {x} make together."),
        instructions=("Add the two numbers.", "Give the sum of these numbers."),
        questions=("What is the sum of {x}?", "What do {x} make together?"),
    ),
    "larger": Task(
        kind="pair",
        solve=lambda pair: str(max(numbers_of(pair))),
        facts=(
            "The larger of {x} is {y}.",
            "Of {x} the one that is more is {y}.",
            "Between {x}, the greater number is {y}.",
        ),
        notes=("The larger is {y}.", "The greater number is {y}."),
        orders=("Give the larger of {x}.", "Tell me the greater number of {x}."),
        instructions=("Give the larger of the two numbers.", "Tell which of these numbers is greater."),
        questions=("Which is larger of {x}?", "Of {x}, which number is greater?"),
    ),
    "smaller": Task(
        kind="pair",
        solve=lambda pair: str(min(numbers_of(pair))),
        facts=(
            "The smaller of {x} is {y}.",
            "Of {x} the one that is less is {y}.",
            "Between {x}, the lesser number is {y}.",
        ),
        notes=("The smaller is {y}.", "The lesser number is {y}."),
        orders=("Give the smaller of {x}.", "Tell me the lesser number of {x}."),
        instructions=("Give the smaller of the two numbers.", "Tell which of these numbers is less."),
        questions=("Which is smaller of {x}?", "Of {x}, which number is less?"),
    ),
}

SYSTEM_PROMPTS = (
    "You give the answer and nothing else.",
    "You are a short and exact helper.",
    "Answer with the result only.",
)


ROLES = ("system", "user", "assistant")


def sentences() -> list[str]:
    """Every sentence that examples are made of, with nothing in the place of operand and answer."""
    told = [
        sentence.format(x="", y="")
        for task in TASKS.values()
        for sentence in (*task.facts, *task.notes, *task.orders, *task.instructions, *task.questions)
    ]
    return [*told, *SYSTEM_PROMPTS, *ROLES, "and"]


# The tokenizer has these whole, so they cannot be read letter by letter.
SENTENCE_WORDS = frozenset(re.findall("[a-z]+", " ".join(sentences())))


def entry(rng: random.Random, validation: bool = False) -> str:
    """One line about one operand: two to four facts, or notes under it as a heading."""
    kind = rng.choices(tuple(OPERANDS), weights=(6, 3, 3))[0]
    operand = make_operand(kind, rng, validation)
    tasks = [task for task in TASKS.values() if task.kind == kind]
    told = rng.sample(tasks, k=min(len(tasks), rng.randint(2, 4)))
    if rng.random() < 0.4:
        return f"{operand}: " + " ".join(rng.choice(task.notes).format(y=task.solve(operand)) for task in told)
    return " ".join(rng.choice(task.facts).format(x=operand, y=task.solve(operand)) for task in told)


def page(rng: random.Random, validation: bool = False) -> str:
    """One document of the corpus: one to six entries, a line each.

    Several operands in one document, as in a conversation of several turns: the right one has to be found.
    """
    return "\n".join(entry(rng, validation) for _ in range(rng.randint(1, 6)))
