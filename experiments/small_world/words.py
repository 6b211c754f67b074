"""The closed word lists of the small world: what entities are called, and what is said of them.

An entity's name is a pair of words, one of each of its kind's two lists, so that every name has near duplicates
(which share one word), and so that names never met in training are made of words that were.
"""

import itertools
import random

NamePool = list[tuple[str, str]]
KINDS = ("person", "place", "company", "work")
TEST_SHARE = 0.2
# Which names are test names is a constant of the world, not of its seed: a base trained on any seed's training
# names has met no seed's test names.
_SPLIT_SEED = 20251

VALUES: dict[str, tuple[str, ...]] = {
    "job": (
        *("baker", "doctor", "farmer", "lawyer", "painter", "pilot", "sailor", "tailor"),
        *("teacher", "writer", "plumber", "gardener", "banker", "dentist", "miner", "judge"),
    ),
    "instrument": (
        *("flute", "piano", "violin", "drum", "harp", "trumpet", "guitar", "organ"),
        *("cello", "oboe", "tuba", "banjo", "lute", "fiddle", "horn", "viola"),
    ),
    "country": (
        *("Norland", "Sudria", "Estovia", "Marania", "Kaldor", "Belmara", "Tessia", "Orvania"),
        *("Lurania", "Pelagia", "Gravonia", "Zembla", "Rovia", "Cascara", "Ilyria", "Dunmark"),
    ),
    "food": (
        *("cheese", "bread", "honey", "soup", "cider", "fish", "plums", "sausage"),
        *("mustard", "noodles", "pies", "olives", "pickles", "mushrooms", "cherries", "beans"),
    ),
    "landmark": (
        *("tower", "fountain", "castle", "statue", "chapel", "market", "theatre", "windmill"),
        *("museum", "palace", "temple", "lighthouse", "library", "prison", "abbey", "gate"),
    ),
    "product": (
        *("boats", "carpets", "candles", "clocks", "bicycles", "lamps", "shoes", "tiles"),
        *("bottles", "pencils", "ropes", "saddles", "mirrors", "buttons", "stoves", "kites"),
    ),
    "genre": (
        *("novel", "play", "poem", "satire", "ballad", "comedy", "tragedy", "diary"),
        *("fable", "thriller", "sonnet", "memoir", "romance", "saga", "legend", "farce"),
    ),
    "year": tuple(str(year) for year in range(1850, 2010, 10)),
}


def _coined(heads: str, endings: str) -> tuple[str, ...]:
    """Words made of a first and a last syllable."""
    return tuple(head + ending for head, ending in itertools.product(heads.split(), endings.split()))


NAME_WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "person": (
        _coined("Ma Be Lo Ti Ra Ke Su No", "ra lin do mi ven"),
        _coined("Tor Hal Bren Mol Kess Dar Vin Gar", "len by wick sen mont"),
    ),
    "place": (
        _coined("Vel Ost Nor Lim Sar Wen", "den ford holm stad"),
        ("Bay", "Hill", "Bridge", "Heath", "Cross", "Port", "Vale", "Moor", "Falls", "Green", "Rock", "Wood"),
    ),
    "company": (
        _coined("Zan Pra Qui Ixo Fer Ulm", "tex nova dyne cor"),
        (
            *("Works", "Mills", "Motors", "Brothers", "Trading", "Labs"),
            *("Foundry", "Press", "Stores", "Partners", "Lines", "Group"),
        ),
    ),
    "work": (
        (
            *("Silent", "Golden", "Broken", "Hidden", "Crimson", "Distant", "Hollow", "Frozen", "Gentle", "Bitter"),
            *("Wooden", "Sleeping", "Burning", "Narrow", "Second", "Last", "Pale", "Wild", "Secret", "Lonely"),
        ),
        (
            *("Lantern", "River", "Garden", "Mask", "Mountain", "Crown", "Letter", "Shadow", "Ocean", "Bell"),
            *("Forest", "Mirror", "Winter", "Road", "Star", "Island", "Tiger", "Storm", "Key", "Dream"),
        ),
    ),
}


def name_pool(kind: str, split: str) -> NamePool:
    """Every name of `kind` that belongs to `split` ("train" or "test"); the two pools share no name."""
    first, last = NAME_WORDS[kind]
    names = list(itertools.product(first, last))
    random.Random(f"{_SPLIT_SEED} {kind}").shuffle(names)
    held_out = round(TEST_SHARE * len(names))
    return {"test": names[:held_out], "train": names[held_out:]}[split]
