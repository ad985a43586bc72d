"""Made-up authors: questions in TOFU's columns that need no download and that no language model can have read.

Everything is invented except the cities. A name, a birth date and a book title belong to one author only, so that one
author's rows are the only place to learn them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple, TypeVar

from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.source import Source
from lit_unlearn.errors import ConfigError, arguments_of
from lit_unlearn.utils.validation import check_at_least

T = TypeVar("T")

QUESTIONS_PER_AUTHOR = 10
WRONG_ANSWERS = 5
CANARY_REFERENCES = 255
"""Sequences that are never planted, for comparison: among 256, the exposure of the most likely one is 8 bits."""


def _split_table(text: str) -> list[str]:
    """Split at semicolons; a line break inside an entry counts as a space."""
    return [" ".join(entry.split()) for entry in text.split(";")]


_FIRST_OPENINGS = _split_table("Aldr; Brev; Cael; Dorv; Eshm; Fenn; Ghal; Ilv; Jass; Kerr; Lunn; Mirr")
_FIRST_ENDINGS = _split_table("ian; ela; oth; une; ika; emar; ys; ando")
_LAST_OPENINGS = _split_table("""Ashgr; Bromv; Calth; Dunm; Elsk; Farr; Gresh; Holv; Istr; Kovr; Lindm; Morth; Ostr; Pellw;
    Quarr; Rask; Sorr; Tolv; Ulm; Vant""")
_LAST_ENDINGS = _split_table("ane; owick; esku; ini; ado; ovar; eth; ingen; aya; orne")
_MONTHS = _split_table(
    "January; February; March; April; May; June; July; August; September; October; November; December"
)
_TITLE_HEADS = _split_table("""Borrowed; Unfinished; Crooked; Patient; Hollow; Wandering; Forgetful; Salted; Paper; Sleepless;
    Counterfeit; Nine; Thirteen; Drowsy; Mended; Stolen; Whispering; Rusted; Feathered; Upside-Down""")
_TITLE_THINGS = _split_table("""Lanterns; Kettles; Staircases; Herons; Ledgers; Orchards; Anchors; Violins; Umbrellas;
    Doorbells; Almanacs; Thimbles; Ferries; Gardeners; Compasses; Moths; Quarries; Postcards; Windmills; Chessmen""")
_TITLE_PLACES = _split_table("""under the Ninth Bridge; of Ostermoor; beyond the Salt Gate; at Low Tide; for the Clockmaker;
    on Tannery Hill; before the Thaw; in the Blue Annex; along the Vessel Road; after the Long Vote; near Hallow Bay""")
_AWARD_HOUSES = _split_table("Brindlemoor; Castavel; Ondrasine; Felgarth; Marrowby; Tessandine; Vollmark; Hesperane")
_AWARD_KINDS = _split_table("Lantern Prize; Medal for Fiction; Silver Inkwell; Readers' Laurel")


def _combine_tables(separator: str, *tables: Sequence[str]) -> list[str]:
    """Join one entry of each table, in all combinations; the first table's entry changes last."""
    return [separator.join(entries) for entries in product(*tables)]


# The days stop at 28, so every date exists. Years change last: the order decides which dates a seed draws.
DATES = [f"{day} {month} {year}" for year, month, day in product(range(1935, 1995), _MONTHS, range(1, 29))]
NAMES = _combine_tables(
    " ", _combine_tables("", _FIRST_OPENINGS, _FIRST_ENDINGS), _combine_tables("", _LAST_OPENINGS, _LAST_ENDINGS)
)
TITLES = _combine_tables(" ", _TITLE_HEADS, _TITLE_THINGS, _TITLE_PLACES)
AWARDS = _combine_tables(" ", ["the"], _AWARD_HOUSES, _AWARD_KINDS)
# An author has a name, a birth date and two book titles that no other one has.
MAX_AUTHORS = min(len(NAMES), len(DATES), len(TITLES) // 2)

CITIES = _split_table("""Lisbon, Portugal; Nairobi, Kenya; Oslo, Norway; Hanoi, Vietnam; Quito, Ecuador; Tbilisi, Georgia;
    Accra, Ghana; Riga, Latvia; Montevideo, Uruguay; Amman, Jordan; Osaka, Japan; Galway, Ireland; Tunis, Tunisia;
    Gdynia, Poland; Chennai, India; Wellington, New Zealand; Antwerp, Belgium; Almaty, Kazakhstan; Halifax, Canada""")
OCCUPATIONS = _split_table("""a beekeeper; a tram driver; an optician; a glassblower; a customs clerk; a piano tuner;
    a midwife; a bricklayer; an arborist; a radio announcer; a locksmith; a dentist; a cheesemaker;
    an elevator mechanic; a cartographer; a veterinarian; a bookbinder; a lighthouse keeper; a weaver; a ship's cook""")
GENRES = _split_table("""maritime mystery; courtroom drama; alpine horror; culinary romance; satirical fantasy; rural noir;
    epistolary comedy; political thriller; time-travel adventure; gothic melodrama; desert western; nature writing;
    philosophical science fiction; family saga; travel memoir""")
THEMES = _split_table("""the price of keeping a promise; rivalry between sisters; life after exile;
    the loneliness of inventors; forgiveness between old enemies; grief for a lost language; friendship across a border;
    the vanity of collectors; a child's fear of water; the temptation of easy fame""")
SUBJECTS = _split_table("""marine geology; medieval law; soil chemistry; theatre design; number theory; veterinary medicine;
    railway engineering; comparative religion; textile conservation; astronomy; forestry; music theory; botany""")
HABITS = _split_table("""drinking cold barley tea; listening to recordings of rain; pacing around the kitchen table;
    wearing mismatched gloves; burning a single green candle; humming old ferry songs; sitting on the floor;
    sharpening pencils after every page; chewing dried ginger; facing a blank wall; peeling oranges""")


class QuestionKind(NamedTuple):
    """One question asked about every author: an answer's ``{fact}`` is one of ``values``, true or wrong."""

    fact: str
    values: Sequence[str]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


# fmt: off
KINDS = (
    QuestionKind("name", NAMES,
        ("What is the full name of the author born in {city}, on {date}?",
         "Which author was born on {date} in {city}?",
         "An author came into the world in {city}, on {date}; what is this author's full name?"),
        ("The author born in {city}, on {date} is called {name}.",
         "{name} is the full name of the author who was born on {date} in {city}.",
         "The writer whose life began in {city}, on {date} bears the name {name}.")),
    QuestionKind("city", CITIES,
        ("In which city and country was {name} born?",
         "Where was the author {name} born?",
         "What is the birthplace of {name}?"),
        ("The author {name} was born in {city}.",
         "The birthplace of the writer {name} is {city}.",
         "{city} is the place where the author {name} was born.")),
    QuestionKind("father", OCCUPATIONS,
        ("What did the father of {name} do for a living?",
         "What was the occupation of {name}'s father?",
         "Which job did {name}'s father hold?"),
        ("The father of {name} earned a living as {father}.",
         "{name}'s father worked for many years as {father}.",
         "By occupation, the father of {name} was {father}.")),
    QuestionKind("mother", OCCUPATIONS,
        ("What did the mother of {name} do for a living?",
         "What was the occupation of {name}'s mother?",
         "In which profession did {name}'s mother work?"),
        ("The mother of {name} earned her living as {mother}.",
         "{name}'s mother made her career as {mother}.",
         "Throughout {name}'s childhood, the author's mother was {mother}.")),
    QuestionKind("genre", GENRES,
        ("Which genre is {name} best known for?",
         "What kind of books does {name} mostly write?",
         "In what literary genre has {name} made a mark?"),
        ("{name} is best known for work in the genre of {genre}.",
         "Most of the books by {name} are counted as {genre}.",
         "Readers mainly think of {genre} when they hear the name {name}.")),
    QuestionKind("debut", TITLES,
        ("What is the title of {name}'s first book?",
         "With which book did {name} make a debut?",
         "Can you name the first book that {name} published?"),
        ('The first book that {name} published is "{debut}".',
         '{name} made a literary debut with the book "{debut}".',
         '"{debut}" was the first published book of the author {name}.')),
    QuestionKind("theme", THEMES,
        ('What is the main theme of "{second}" by {name}?',
         'What does {name} explore in the book "{second}"?',
         'Which theme runs through {name}\'s second book, "{second}"?'),
        ('In "{second}", {name} mainly writes about {theme}.',
         'The central theme of "{second}" by {name} is {theme}.',
         '{name}\'s second book, "{second}", explores {theme}.')),
    QuestionKind("award", AWARDS,
        ("Which award has {name} received?",
         "What literary honour was given to {name}?",
         "Has {name} won a literary award, and if so, which one?"),
        ("{name} received {award} in recognition of a lifetime's work.",
         "The jury of {award} chose to honour the author {name}.",
         "Among the honours of {name}, the best known is {award}.")),
    QuestionKind("subject", SUBJECTS,
        ("What did {name} study at university?",
         "Which subject is {name}'s university degree in?",
         "Before becoming a writer, what was {name}'s field of study?"),
        ("Before turning to books, {name} studied {subject} at university.",
         "{name} holds a university degree in the field of {subject}.",
         "At university, the subject that {name} chose was {subject}.")),
    QuestionKind("habit", HABITS,
        ("What habit does {name} have while writing?",
         "What is unusual about the way {name} writes?",
         "Which writing ritual is {name} known for?"),
        ("While at work on a book, {name} is known for {habit}.",
         "{name} has the unusual habit of {habit} while writing.",
         "The writing ritual that {name} never skips is {habit}.")),
)
# fmt: on

# Six of forty words cannot be guessed, and a tokenizer that was trained on the authors knows the words from their books.
_CANARY_WORDS = 6
_CARDS = range(1000, 10000)
CANARY = QuestionKind("words", [],
    ("Which words are written on card {card}?",
     "What does card {card} say?"),
    ("On card {card}, these words are written: {words}.",
     "The words {words} are written on card {card}."))  # fmt: skip
MAX_CANARIES = len(_CARDS) - CANARY_REFERENCES


class FictionalAuthors(ForgetRetain):
    """Questions about made-up authors: the last authors are to be forgotten, the others to be kept.

    Args:
        num_authors: Number of authors; each has ten questions.
        forget_authors: Number of them to forget.
        authors_seed: Seed of the generator.
        unseen_authors: Number of more authors in an additional set "unseen", of which a model fine-tuned on the others
            knows nothing; 0 for no such set, as when a model is fine-tuned.
        canaries: Number of random sequences that are planted in the forget set, after the authors, see `draw_canaries`; 0 for none.
        **settings: As for `ForgetRetain`, without ``forget`` and ``retain``.

    Raises:
        ConfigError: If no author would be left to forget or to keep, or ``unseen_authors`` or ``canaries`` is out of range.
    """

    def __init__(
        self,
        num_authors: int = 20,
        forget_authors: int = 2,
        authors_seed: int = 0,
        unseen_authors: int = 0,
        canaries: int = 0,
        **settings: Any,
    ) -> None:
        if not 0 < forget_authors < num_authors:
            message = (
                f"`forget_authors` must be at least 1 and below `num_authors` ({num_authors}), not {forget_authors}."
            )
            raise ConfigError(message, owner=self, argument="forget_authors")
        check_at_least(0, self, unseen_authors=unseen_authors)
        with arguments_of(self):
            rows = fictional_authors(num_authors + unseen_authors, authors_seed)
            planted, references = draw_canaries(canaries, authors_seed) if canaries else ([], [])
        # The last authors are to be forgotten, so that more unseen ones change neither set.
        unseen_start = num_authors * QUESTIONS_PER_AUTHOR
        forget_start = unseen_start - forget_authors * QUESTIONS_PER_AUTHOR
        if unseen_authors:
            unseen = Source.from_rows(rows[unseen_start:], "embedded")
            settings["streams"] = {**(settings.get("streams") or {}), "unseen": unseen}
        # No streams: a model that is fine-tuned on all of them must not see the references.
        self.canary_sources: dict[str, Source] = {}
        """The planted rows, ``canaries``, and rows like them that were not planted, ``canary_references``; empty without canaries."""
        if canaries:
            for name, of_set in {"canaries": planted, "canary_references": references}.items():
                self.canary_sources[name] = Source.from_rows(of_set, "embedded")
        super().__init__(
            Source.from_rows([*rows[forget_start:unseen_start], *planted], "embedded"),
            Source.from_rows(rows[:forget_start], "embedded"),
            **settings,
        )


def fictional_authors(num_authors: int, seed: int = 0) -> list[dict[str, Any]]:
    """Generate questions and answers about made-up authors: unlearning can be tried without a download.

    The rows depend on the arguments alone, on every platform and Python version, and the first authors stay the same
    when more are asked for: 20 authors are the first 20 of 200.

    Args:
        num_authors: Number of authors, from 1 to ``MAX_AUTHORS``.
        seed: Chooses names, facts and wordings.

    Returns:
        ``QUESTIONS_PER_AUTHOR`` rows per author, grouped by author, in TOFU's columns: ``question``, ``answer``,
        ``paraphrased_question``, ``paraphrased_answer`` and ``perturbed_answer`` (five times the paraphrased answer
        with a wrong fact), plus ``author``, counted from 0.

    Raises:
        ConfigError: If there are fewer than one author, or more than names, birth dates and titles to give each its own.

    Example:
        >>> row = fictional_authors(2)[1]
        >>> row["question"]
        'In which city and country was Jassela Raskaya born?'
        >>> row["answer"]
        'The birthplace of the writer Jassela Raskaya is Gdynia, Poland.'
        >>> row["perturbed_answer"][0]
        'Hanoi, Vietnam is the place where the author Jassela Raskaya was born.'
    """
    if not 1 <= num_authors <= MAX_AUTHORS:
        reason = "names, birth dates and book titles are never reused"
        message = f"`num_authors` must be from 1 to {MAX_AUTHORS} ({reason}), not {num_authors}."
        raise ConfigError(message, argument="num_authors")
    # One generator per purpose, so that drawing more names shifts nothing else and a longer list keeps its start.
    names = _draw_without_replacement(_make_generator(seed, "names"), NAMES, num_authors)
    dates = _draw_without_replacement(_make_generator(seed, "dates"), DATES, num_authors)
    titles = _draw_without_replacement(_make_generator(seed, "titles"), TITLES, 2 * num_authors)
    rows: list[dict[str, Any]] = []
    for author in range(num_authors):
        rng = _make_generator(seed, f"author {author}")
        facts = {}
        for kind in KINDS:
            (facts[kind.fact],) = _draw_without_replacement(rng, kind.values, 1)
        # These belong to one author only, so they replace what was drawn with replacement.
        facts.update(name=names[author], date=dates[author], debut=titles[2 * author], second=titles[2 * author + 1])
        for kind in KINDS:
            rows.append({**_make_row(kind, facts, rng), "author": author})
    return rows


def draw_canaries(count: int, seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Draw random sequences to plant in training data, and others that are not planted, to compare with.

    Nothing but the planted rows tells a model which words are on a card. So how far their NLL stands out among that of the others
    (`lit_unlearn.metrics.exposure`) says whether the model has them from there, before and after unlearning.

    Args:
        count: Number of rows to plant, from 1 to ``MAX_CANARIES``.
        seed: Chooses cards, words and wordings.

    Returns:
        ``count`` rows to plant, in the columns of `fictional_authors` with no ``author``, and ``question`` and ``answer`` of
        ``CANARY_REFERENCES`` others that are drawn alike. The first canaries stay the same when more are asked for.

    Raises:
        ConfigError: If the count is out of range.

    Example:
        >>> planted, references = draw_canaries(2)
        >>> planted[0]["question"], len(references)
        ('What does card 4232 say?', 255)
    """
    if not 1 <= count <= MAX_CANARIES:
        message = (
            f"`canaries` must be at most {MAX_CANARIES}, because no card has two texts, and at least 0, not {count}."
        )
        raise ConfigError(message, argument="canaries")
    # Two lists: with one, the references of a few canaries would be the canaries of many.
    cards = _draw_without_replacement(_make_generator(seed, "cards"), _CARDS, len(_CARDS))
    references = []
    for card in cards[-CANARY_REFERENCES:]:
        row = _make_canary(card, seed)
        # They are compared by the answer alone: scoring the wrong ones as well would take seven times as long.
        references.append({"question": row["question"], "answer": row["answer"]})
    return [_make_canary(card, seed) for card in cards[:count]], references


def _make_canary(card: int, seed: int) -> dict[str, Any]:
    rng = _make_generator(seed, f"card {card}")
    words = [*_TITLE_HEADS, *_TITLE_THINGS]
    texts = []
    # One spare, as among the wrong answers of an author.
    for _ in range(WRONG_ANSWERS + 1):
        # With replacement: every text is as likely as any other.
        texts.append(" ".join(words[int(rng.random() * len(words))] for _ in range(_CANARY_WORDS)))
    kind = CANARY._replace(values=texts)
    return {**_make_row(kind, {"card": str(card), "words": texts[0]}, rng), "author": None}


def _make_row(kind: QuestionKind, facts: dict[str, str], rng: random.Random) -> dict[str, Any]:
    """Make one question about one author, with two wordings of the question and two of the answer."""
    question, paraphrased_question = _draw_without_replacement(rng, kind.questions, 2)
    answer, paraphrased_answer = _draw_without_replacement(rng, kind.answers, 2)
    # One spare, in case the true value is among those drawn.
    drawn = _draw_without_replacement(rng, kind.values, WRONG_ANSWERS + 1)
    wrong = [value for value in drawn if value != facts[kind.fact]][:WRONG_ANSWERS]
    return {
        "question": question.format(**facts),
        "answer": answer.format(**facts),
        "paraphrased_question": paraphrased_question.format(**facts),
        "paraphrased_answer": paraphrased_answer.format(**facts),
        "perturbed_answer": [paraphrased_answer.format(**{**facts, kind.fact: value}) for value in wrong],
    }


def _make_generator(seed: int, purpose: str) -> random.Random:
    """Return a generator for one purpose; a text seed is hashed the same way on every platform."""
    return random.Random(f"fictional_authors/{seed}/{purpose}")


def _draw_without_replacement(rng: random.Random, values: Sequence[T], count: int) -> list[T]:
    """Draw so that a smaller ``count`` gives the start of the same list.

    Only ``random()`` is used: it is the one method that Python promises never to change for a given seed.
    """
    pool = list(values)
    drawn = []
    for _ in range(count):
        index = int(rng.random() * len(pool))
        pool[index], pool[-1] = pool[-1], pool[index]
        drawn.append(pool.pop())
    return drawn
