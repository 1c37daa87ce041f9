"""What an error may look like to a user."""


def one_sentence(error: BaseException) -> str:
    """The text of an error that a user sees."""
    text = str(error)
    assert text and "\n" not in text and len(text) < 700
    return text
