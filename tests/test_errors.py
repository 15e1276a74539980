from tnl.errors import DataError, MemoryBudgetError, ModelError, NumbersError, RecipeError, StorageError


def test_an_error_is_one_line_with_where_what_and_todo() -> None:
    error = DataError("a.json:record 17", '"output" is missing (found instruction)', "Every record needs instruction and output.")
    assert str(error) == 'a.json:record 17: "output" is missing (found instruction). Every record needs instruction and output.'


def test_a_line_ends_once() -> None:
    assert str(DataError("a", "is wrong.", "Mend it")) == str(DataError("a", "is wrong", "Mend it.")) == "a: is wrong. Mend it."
    assert str(DataError("a", "is wrong", "Did you mean b?")) == "a: is wrong. Did you mean b?"
    assert str(DataError("", "is wrong")) == "is wrong."


def test_control_characters_are_shown_and_not_sent_to_the_terminal() -> None:
    assert str(DataError("a\n.json", "odd \x1b[31m")) == "a\\n.json: odd \\x1b[31m."


def test_each_kind_has_its_exit_code() -> None:
    kinds = (RecipeError, DataError, ModelError, NumbersError, StorageError, MemoryBudgetError)
    assert [kind.exit_code for kind in kinds] == [2, 3, 4, 5, 6, 7]


def test_three_dots_at_the_end_stay() -> None:
    assert str(DataError("a", "is wrong", "Leave out https://...")) == "a: is wrong. Leave out https://..."
