"""How the rows that tokens send to their experts are sorted and multiplied, one implementation per file."""
