"""Names and words of our tasks."""

__all__ = ["LAST_NAMES", "THEMES"]

LAST_NAMES: tuple[str, ...] = tuple(
    """Abel Arden Bakker Berg Blum Brandt Castell Dahl Dorn Ekman Engel Falk Farkas Ferro Frost Gander Greve Haas Halm
    Hoff Holt Iversen Jansen Juhl Kern Koch Kovar Krol Lang Lind Lopata Lund Marek Mertens Moro Nagy Nolte Nord Oberg
    Palm Pinter Quist Rask Renard Rossi Sand Seidel Sturm Tamm Thorn Toth Ulrich Varga Vogel Wald Winter Wolff Zeman
    """.split()
)

# Nouns that go with "the"; "ideas" are the abstract ones.
THEMES: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "harbour": "boat sailor anchor harbour wave lighthouse net captain",
        "kitchen": "oven spoon soup onion knife plate recipe cook",
        "garden": "rose fence spade hedge bee lawn seed shed",
        "school": "teacher pencil lesson desk pupil blackboard break book",
        "music": "violin drum choir melody stage concert piano rhythm",
        "winter": "snow scarf sledge ice fireplace boot glove mountain",
        "travel": "train ticket suitcase platform map hotel border bridge",
        "market": "apple basket coin stall customer price scale bread",
        "farm": "cow tractor barn hay goat field farmer dog",
        "office": "printer letter meeting stapler folder lamp manager clock",
        "ideas": "patience symmetry rumour doubt freedom theory silence courage irony memory paradox justice",
    }.items()
}
