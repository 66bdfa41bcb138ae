"""Small string and number tasks with one right answer, and their wordings.

Each task has two kinds of wordings. `facts` and `notes` are statements for the pretraining corpus, which teach a base
model the skill. `orders`, `instructions` and `questions` are what a user would type; the fine-tuning data is made of
them. The checksum of an operand (a word, a number, a pair of numbers) decides whether it is held out for validation:
whatever the seed, no operand of the validation files is in the corpus or in the training files.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

VOWELS = "aeiou"
CONSONANTS = "bdfgklmnprstvz"
HELD_OUT_IN = 8  # one operand in eight is held out


def held_out(operand: str) -> bool:
    """Returns whether `operand` belongs to the validation split; this depends on the operand alone."""
    return zlib.crc32(operand.encode()) % HELD_OUT_IN == 0


def make_word(rng: random.Random) -> str:
    """Draws a pronounceable made-up word of three to six letters."""
    length = rng.choice((3, 4, 4, 5, 5, 6))
    starts_with_vowel = rng.random() < 0.25
    return "".join(
        rng.choice(VOWELS if (position + starts_with_vowel) % 2 else CONSONANTS) for position in range(length)
    )


def make_number(rng: random.Random) -> str:
    """Draws a number of three or four digits."""
    return str(rng.randint(100, 999) if rng.random() < 0.5 else rng.randint(1000, 9999))


def make_pair(rng: random.Random) -> str:
    """Draws two different numbers below fifty, written `a and b`."""
    first, second = rng.sample(range(1, 50), 2)
    return f"{first} and {second}"


OPERANDS: dict[str, Callable[[random.Random], str]] = {"word": make_word, "number": make_number, "pair": make_pair}


def make_operand(kind: str, rng: random.Random, validation: bool) -> str:
    """Draws operands of `kind` until one belongs to the split and is not a word of the wordings."""
    while True:
        operand = OPERANDS[kind](rng)
        if held_out(operand) == validation and operand not in SENTENCE_WORDS:
            return operand


def parse_pair(pair: str) -> tuple[int, int]:
    """Returns the two numbers of a `pair` operand."""
    first, second = pair.split(" and ")
    return int(first), int(second)


@dataclass(frozen=True)
class Task:
    """One skill.

    Attributes:
        kind: the operand it works on, a key of `OPERANDS`.
        solve: returns the right answer for an operand.
        facts: sentences of the corpus, with `{x}` for the operand and `{y}` for the answer.
        notes: sentences of the corpus about an operand named before, with `{y}` only.
        orders: what a user types, with `{x}`.
        instructions: the same without the operand, which is the `input` of an alpaca row.
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
        facts=("The word {x} said twice is {y}.", "To repeat {x} is to say {y}.", "Who says {x} two times says {y}."),
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
        facts=("The word {x} is spelled {y}.", "Letter by letter, {x} reads {y}.", "One spells {x} as {y}."),
        notes=("It is spelled {y}.", "Letter by letter it reads {y}."),
        orders=("Spell {x}.", "Give me the word {x} letter by letter."),
        instructions=("Spell this word.", "Write the word letter by letter."),
        questions=("How is {x} spelled?", "How do I spell the word {x}?"),
    ),
    "next": Task(
        kind="number",
        solve=lambda number: str(int(number) + 1),
        facts=("The number after {x} is {y}.", "Next to come when one counts past {x} is {y}.", "One past {x} is {y}."),
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
        solve=lambda pair: str(sum(parse_pair(pair))),
        facts=("The sum of {x} is {y}.", "To add {x} gives {y}.", "Together {x} make {y}."),
        notes=("The sum is {y}.", "Together they make {y}."),
        orders=("Add {x}.", "Give the sum of {x}.", "Tell me what {x} make together."),
        instructions=("Add the two numbers.", "Give the sum of these numbers."),
        questions=("What is the sum of {x}?", "What do {x} make together?"),
    ),
    "larger": Task(
        kind="pair",
        solve=lambda pair: str(max(parse_pair(pair))),
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
        solve=lambda pair: str(min(parse_pair(pair))),
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


def list_sentences() -> list[str]:
    """Returns every sentence of the examples, without operands and answers."""
    wordings = [
        sentence.format(x="", y="")
        for task in TASKS.values()
        for sentence in (*task.facts, *task.notes, *task.orders, *task.instructions, *task.questions)
    ]
    return [*wordings, *SYSTEM_PROMPTS, "system", "user", "assistant", "and"]


# Each is one token, so no task can be asked about its letters.
SENTENCE_WORDS = frozenset(re.findall("[a-z]+", " ".join(list_sentences())))


def make_entry(rng: random.Random, validation: bool = False) -> str:
    """Makes one line about one operand: two to four facts, or notes after the operand as a heading."""
    kind = rng.choices(tuple(OPERANDS), weights=(6, 3, 3))[0]
    operand = make_operand(kind, rng, validation)
    tasks = [task for task in TASKS.values() if task.kind == kind]
    chosen = rng.sample(tasks, k=min(len(tasks), rng.randint(2, 4)))
    if rng.random() < 0.4:
        return f"{operand}: " + " ".join(rng.choice(task.notes).format(y=task.solve(operand)) for task in chosen)
    return " ".join(rng.choice(task.facts).format(x=operand, y=task.solve(operand)) for task in chosen)


def make_page(rng: random.Random, validation: bool = False) -> str:
    """Makes one document of the corpus: one to six entries, one per line.

    A document has several operands, like a conversation of several turns, and the model must find the right one.
    """
    return "\n".join(make_entry(rng, validation) for _ in range(rng.randint(1, 6)))
