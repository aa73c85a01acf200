"""A demo corpus of any size from a small grammar of our own, so that everything can be tried without a download.

Three tasks of very unequal size, in which the order of the words matters as much as the words:

    sentiment    0 to 4      "the plot was brilliant but the music was not very good" is neutral (2): `JOINTS` and
                             `MODIFIERS` say how much each part counts
    paraphrase   0 or 1      "the tall baker phoned the rich doctor at dawn" says what "at sunrise the tall baker called
                             the wealthy physician" says, but not "the tall doctor phoned the rich baker at dawn"
    similarity   0.0 to 5.0  the points in `SLOTS` for all that two such sentences agree on

A row is a pure function of (seed, task, split, number): a larger corpus begins with the smaller one. What a row says
decides which split may hold it: no opinion, and no pair of scenes in whatever words, stands in two splits of a task.
"""

import math
import re
import string
import zlib
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple, TextIO, TypeVar

from mtl_dist.config import UserError

# --- Scenes, the sentences of paraphrase and similarity: "a/b" are two words for one thing, "" leaves it unsaid. ---

PEOPLE = ("baker", "doctor/physician", "farmer", "lawyer/attorney", "painter", "pilot", "singer/vocalist", "tailor")
TRAITS = ("tall", "old/elderly", "rich/wealthy", "happy/cheerful", "famous", "clever/smart")
VERBS = (
    *("called/phoned", "fooled/tricked", "helped/assisted", "hired/employed", "saved/rescued"),
    *("followed", "praised", "watched"),
)
PLACES = ("", "at home", "at sea", "at work", "in court", "in town", "on stage")
TIMES = ("", "at dawn/at sunrise", "at dusk/at sunset", "at noon/at midday", "in june", "in winter", "on monday")

# What a scene tells, in which words, and the points of similarity for agreeing on it.
SLOTS = {
    "agent": (PEOPLE, 1.0),
    "agent_trait": (TRAITS, 0.5),
    "verb": (VERBS, 1.0),
    "patient": (PEOPLE, 1.0),
    "patient_trait": (TRAITS, 0.5),
    "place": (PLACES, 0.5),
    "time": (TIMES, 0.5),
}
EVENT = "the {agent_trait} {agent} {verb} the {patient_trait} {patient}"
ORDERS = (
    EVENT + " {place} {time}",
    EVENT + " {time} {place}",
    EVENT + " {time} {place} as usual",
    "{time} " + EVENT + " {place}",
)

# The near-misses: the same words, but who is who, who is what, or both have changed places.
PEOPLE_SWAPPED = {"agent": "patient", "patient": "agent"}
TRAITS_SWAPPED = {"agent_trait": "patient_trait", "patient_trait": "agent_trait"}
SWAPS = (PEOPLE_SWAPPED, TRAITS_SWAPPED, PEOPLE_SWAPPED | TRAITS_SWAPPED)

# --- Opinions, the sentences of sentiment. ---

ASPECTS = {
    "film": ("cast", "ending", "music", "plot"),
    "hotel": ("breakfast", "room", "staff", "view"),
    "restaurant": ("food", "menu", "service", "wine"),
}
MILD = {"good": 1, "nice": 1, "pleasant": 1, "solid": 1, "bad": -1, "dull": -1, "poor": -1, "weak": -1}
STRONG = {"brilliant": 1, "perfect": 1, "superb": 1, "awful": -1, "dreadful": -1, "horrible": -1}
NEUTRAL = {"average": 0, "ordinary": 0, "passable": 0, "typical": 0}

# How far from neutral a modifier puts each kind of adjective, and on which side.
MODIFIERS = (
    (MILD, {"": 2, "very": 3, "really": 3, "fairly": 1, "rather": 1, "not": -2, "hardly": -2, "not very": -1}),
    (STRONG, {"": 4, "truly": 4, "simply": 4, "hardly": -1, "not exactly": -1}),
    (NEUTRAL, {"": 0}),
)
OPINIONS = [
    (f"{modifier} {adjective}".strip(), polarity * strength)
    for adjectives, modifiers in MODIFIERS
    for adjective, polarity in adjectives.items()
    for modifier, strength in modifiers.items()
]
# A sentence's score is its opinions' mean, weighted like this.
JOINTS = (
    ("the {aspect} of the {topic} was {opinion}", (1.0, 0.0)),
    ("the {aspect} was {opinion} and the {aspect2} was {opinion2}", (0.5, 0.5)),
    ("the {aspect} was {opinion} but the {aspect2} was {opinion2}", (0.25, 0.75)),
    ("although the {aspect} was {opinion}, the {aspect2} was {opinion2}", (0.25, 0.75)),
)
LABEL_CUTS = (-2.4, -0.6, 0.6, 2.4)  # between the scores, which are multiples of 1/4

# --- Rows. ---

T = TypeVar("T")
Scene = Mapping[str, str]  # slot -> words


class Row(NamedTuple):
    """One example, and what it says however it is said."""

    meaning: str
    sentences: tuple[str, ...]
    label: str


def _pick(options: Sequence[T], rng: Random) -> T:
    # Python keeps the sequence of random() over all its versions, and of nothing else.
    return options[int(rng.random() * len(options))]


def _reword(scene: Scene, slot: str, rng: Random) -> Scene:
    """The scene with other words in one slot; no words stand twice in a scene, so nobody helps himself."""
    options, _ = SLOTS[slot]
    return {**scene, slot: _pick([words for words in options if words not in scene.values()], rng)}


def _draw_scene(rng: Random) -> Scene:
    scene: Scene = {}
    for slot in SLOTS:
        scene = _reword(scene, slot, rng)
    return scene


def _swap(scene: Scene, rng: Random) -> Scene:
    return {**scene, **{slot: scene[other] for slot, other in _pick(SWAPS, rng).items()}}


def _say(scene: Scene, rng: Random) -> str:
    said = {slot: _pick(words.split("/"), rng) for slot, words in scene.items()}
    return " ".join(_pick(ORDERS, rng).format_map(said).split())


def _say_both(scene: Scene, other: Scene, label: str, rng: Random) -> Row:
    first = second = _say(scene, rng)
    while second == first:
        second = _say(other, rng)
    meaning = " ~ ".join(sorted((" ".join(scene.values()), " ".join(other.values()))))
    return Row(meaning, (first, second), label)


def _draw_paraphrase(rng: Random) -> Row:
    scene = _draw_scene(rng)
    fate = rng.random()
    if fate < 0.45:
        return _say_both(scene, scene, "1", rng)
    near_miss = _swap(scene, rng) if fate < 0.8 else _reword(scene, _pick(list(SLOTS), rng), rng)
    return _say_both(scene, near_miss, "0", rng)


def _draw_similarity(rng: Random) -> Row:
    scene = _draw_scene(rng)
    other = _swap(scene, rng) if rng.random() < 0.6 else scene
    how_different = rng.random() ** 2  # mostly little, so that the swaps tell
    for slot in SLOTS:
        if rng.random() < how_different:
            other = _reword(other, slot, rng)
    agreed = sum(points for slot, (_, points) in SLOTS.items() if scene[slot] == other[slot])
    return _say_both(scene, other, f"{agreed:.1f}", rng)


def _draw_sentiment(rng: Random) -> Row:
    joint, weights = _pick(JOINTS, rng)
    topic = _pick(list(ASPECTS), rng)
    aspect = _pick(ASPECTS[topic], rng)
    aspect2 = _pick([a for a in ASPECTS[topic] if a != aspect], rng)
    (opinion, score), (opinion2, score2) = _pick(OPINIONS, rng), _pick(OPINIONS, rng)
    sentence = joint.format(topic=topic, aspect=aspect, opinion=opinion, aspect2=aspect2, opinion2=opinion2)
    label = bisect(LABEL_CUTS, weights[0] * score + weights[1] * score2)
    return Row(sentence, (sentence,), str(label))


DRAWS: dict[str, Callable[[Random], Row]] = {
    "sentiment": _draw_sentiment,
    "paraphrase": _draw_paraphrase,
    "similarity": _draw_similarity,
}
SPLITS = ("train",) * 8 + ("dev", "test")  # of ten meanings, by their hash


def draw_row(task: str, split: str, number: int, seed: int) -> Row:
    """Row `number` of a task's split: draws until the split may hold what was drawn."""
    rng = Random(f"{seed} {task} {split} {number}")
    while True:
        row = DRAWS[task](rng)
        if SPLITS[zlib.crc32(row.meaning.encode()) % len(SPLITS)] == split:
            return row


# --- Files. ---

SHARES = {"sentiment": 0.1, "paraphrase": 0.8, "similarity": 0.1}
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_corpus(
    folder: Path,
    *,
    rows: int = 20_000,
    shares: Mapping[str, float] = SHARES,
    dev_rows: int = 500,
    seed: int = 0,
) -> dict[str, int]:
    """Writes `<task>-{train,dev,test}.tsv`, `tokenizer.json` and `vocab.txt`; returns the training rows of each task.

    `rows` of training are dealt out by `shares`; dev and test have `dev_rows` each for every task.
    """
    sizes = _sizes(rows, shares)
    if not 1 <= dev_rows <= 10_000:
        raise UserError(f"dev_rows is {dev_rows}, outside the range [1, 10000]")
    folder.mkdir(parents=True, exist_ok=True)
    for task, size in sizes.items():
        for split in ("train", "dev", "test"):
            _write_rows(folder / f"{task}-{split}.tsv", task, split, size if split == "train" else dev_rows, seed)
    _write_tokenizer(folder)
    return sizes


def _sizes(rows: int, shares: Mapping[str, float]) -> dict[str, int]:
    if not 100 <= rows <= 1_000_000:
        raise UserError(f"rows is {rows}, outside the range [100, 1000000]")
    if not shares:
        raise UserError(f"shares is empty; name at least one of {', '.join(DRAWS)}")
    for task, share in shares.items():
        if task not in DRAWS:
            raise UserError(f"shares has no task {task!r}; the tasks are {', '.join(DRAWS)}")
        if not (share > 0 and math.isfinite(share)):
            raise UserError(f"shares.{task} is {share}, not a positive number; to do without the task, leave it out")
    # Rounding the running total, not each size, keeps the sum exact.
    sizes, dealt, total = {}, 0, 0.0
    for task, share in shares.items():
        total += share / sum(shares.values())
        sizes[task] = round(rows * total) - dealt
        dealt += sizes[task]
        if not sizes[task]:
            raise UserError(f"shares.{task} is {share}, which is none of {rows} rows; raise it, or leave the task out")
    return sizes


def _write_rows(path: Path, task: str, split: str, size: int, seed: int) -> None:
    pair = task != "sentiment"
    with _whole_or_not_at_all(path) as file:
        file.write("id\tsentence1\tsentence2\tlabel\n" if pair else "id\tsentence\tlabel\n")
        for number in range(size):
            row = draw_row(task, split, number, seed)
            file.write("\t".join((f"{split}-{number}", *row.sentences, row.label)) + "\n")


def vocabulary() -> list[str]:
    """Every word of the grammar, for any size and seed; the letters and digits spell what others may type."""
    tables = str((ORDERS, PEOPLE, TRAITS, VERBS, PLACES, TIMES, JOINTS, OPINIONS, ASPECTS))
    words = re.findall("[a-z]+", re.sub(r"{\w+}", "", tables))
    letters = string.ascii_lowercase + string.digits
    return [*SPECIALS, *string.punctuation, *letters, *(f"##{letter}" for letter in letters), *sorted(set(words))]


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces = vocabulary()
    ids = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(piece, ids[piece]) for piece in ("[CLS]", "[SEP]")],
    )
    tokenizer.decoder = decoders.WordPiece()
    with _whole_or_not_at_all(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str(pretty=True))
    with _whole_or_not_at_all(folder / "vocab.txt") as file:
        file.writelines(f"{piece}\n" for piece in pieces)


@contextmanager
def _whole_or_not_at_all(path: Path) -> Iterator[TextIO]:
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w", encoding="utf-8", newline="\n") as file:
        yield file
    draft.replace(path)
