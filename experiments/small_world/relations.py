"""What can be said and asked about each kind of entity.

`{s}` is the subject's name, `{o}` the object. In every statement the name stands before the object. Each relation
has two statements (a document uses one, its paraphrase the other) and two questions. A relation whose object is an
entity also has a `description`, by which a two-hop question names that entity.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Relation:
    """One attribute of one kind of entity; `object` is a list of `words.VALUES` or a kind of entity."""

    name: str
    object: str
    statements: tuple[str, str]
    questions: tuple[str, str]
    description: str = ""


RELATIONS: dict[str, tuple[Relation, ...]] = {
    "person": (
        Relation(
            "birthplace",
            "place",
            ("{s} was born in {o}.", "{s} comes from {o}."),
            ("Where was {s} born?", "What is the birthplace of {s}?"),
            "the birthplace of {s}",
        ),
        Relation(
            "home",
            "place",
            ("{s} lives in {o}.", "The home of {s} is {o}."),
            ("Where does {s} live?", "Where is the home of {s}?"),
            "the home of {s}",
        ),
        Relation(
            "job",
            "job",
            ("{s} works as a {o}.", "{s} earns money as a {o}."),
            ("What is the job of {s}?", "What does {s} work as?"),
        ),
        Relation(
            "instrument",
            "instrument",
            ("{s} plays the {o}.", "{s} is good at the {o}."),
            ("What does {s} play?", "Which instrument does {s} play?"),
        ),
    ),
    "place": (
        Relation(
            "country",
            "country",
            ("{s} lies in {o}.", "{s} belongs to {o}."),
            ("In which country is {s}?", "Which country does {s} belong to?"),
        ),
        Relation(
            "food",
            "food",
            ("{s} is known for its {o}.", "Visitors to {s} like the {o}."),
            ("What is {s} known for?", "What do visitors to {s} like?"),
        ),
        Relation(
            "mayor",
            "person",
            ("The mayor of {s} is {o}.", "{s} is governed by {o}."),
            ("Who is the mayor of {s}?", "Who governs {s}?"),
            "the mayor of {s}",
        ),
        Relation(
            "landmark",
            "landmark",
            ("{s} has a famous {o}.", "At the centre of {s} stands a {o}."),
            ("What stands at the centre of {s}?", "Which landmark does {s} have?"),
        ),
    ),
    "company": (
        Relation(
            "founder",
            "person",
            ("{s} was founded by {o}.", "The founder of {s} is {o}."),
            ("Who founded {s}?", "Who is the founder of {s}?"),
            "the founder of {s}",
        ),
        Relation(
            "seat",
            "place",
            ("{s} is based in {o}.", "The seat of {s} is {o}."),
            ("Where is {s} based?", "Where is the seat of {s}?"),
            "the seat of {s}",
        ),
        Relation(
            "product",
            "product",
            ("{s} makes {o}.", "Shops buy from {s} their {o}."),
            ("What does {s} make?", "What do shops buy from {s}?"),
        ),
        Relation(
            "opening",
            "year",
            ("{s} opened in {o}.", "{s} has been open since {o}."),
            ("When did {s} open?", "Since when has {s} been open?"),
        ),
    ),
    "work": (
        Relation(
            "author",
            "person",
            ("{s} was written by {o}.", "The author of {s} is {o}."),
            ("Who wrote {s}?", "Who is the author of {s}?"),
            "the author of {s}",
        ),
        Relation(
            "genre",
            "genre",
            ("{s} is a {o}.", "Readers call {s} a {o}."),
            ("What kind of book is {s}?", "What do readers call {s}?"),
        ),
        Relation(
            "setting",
            "place",
            ("The story of {s} takes place in {o}.", "{s} is set in {o}."),
            ("Where is {s} set?", "Where does the story of {s} take place?"),
            "the setting of {s}",
        ),
        Relation(
            "publication",
            "year",
            ("{s} appeared in {o}.", "{s} came out in {o}."),
            ("When did {s} appear?", "When did {s} come out?"),
        ),
    ),
}
