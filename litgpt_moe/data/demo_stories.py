"""The built-in demo corpus, told by the grammar of configs/demo_stories.yaml."""

import hashlib
import random
import re
from pathlib import Path

import yaml

from litgpt_moe.cli import note
from litgpt_moe.data.settings import CONFIGS, PrepareSettings
from litgpt_moe.data.text import refuse_other_text
from litgpt_moe.files import read_json, sha256_file, write_json, write_whole

PRONOUNS = {"girl": ("she", "her", "her", "herself"), "boy": ("he", "him", "his", "himself")}
GRAMMAR = CONFIGS / "demo_stories.yaml"


class StoryTeller:
    """Tells stories by the grammar of configs/demo_stories.yaml; the same seed tells the same stories."""

    SLOT = re.compile(r"\{(\w+)\}")

    def __init__(self, grammar: Path, seed: int) -> None:
        content = yaml.safe_load(grammar.read_text(encoding="utf-8"))
        self.cast, self.words = content["cast"], content["words"]
        self.phrases = {name: text.splitlines() for name, text in content["phrases"].items()}
        self.arcs = [[p.split("\n\n") for p in text.split("\n//\n")] for text in content["arcs"].values()]
        self._random = random.Random(seed)
        self._bound: dict[str, str] = {}

    def story(self) -> str:
        """Return one story, its characters and things the same from start to end."""
        number = self._random.randrange(len(self.arcs))
        self._bound = self._cast_of(number)
        told = (
            [self._fill(self._random.choice(lines.strip().split("\n"))) for lines in part]
            for part in self.arcs[number]
        )
        text = "\n".join(" ".join(filter(None, sentences)) for sentences in told)
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)

    def _cast_of(self, number: int) -> dict[str, str]:
        """Return the characters' names, kinds and pronouns, always the same ones for an arc.

        A small model learns which story has which heroes within the demo's thousand steps; to carry any name
        from the first line to the last takes it several times as many.
        """
        choose = random.Random(number).choice
        hero_is, friend_is = choose(("girl", "boy")), choose(("girl", "boy"))
        hero, parent = choose(self.cast[hero_is]), choose(self.cast["parent"])
        friend = choose([name for name in self.cast[friend_is] if name != hero])
        bound = {"hero": hero, "friend": friend, "parent": parent, "kind": hero_is, "friend_kind": friend_is}
        if number % 3 == 0:  # an animal, and so are its friends
            bound |= {"kind": choose(self.cast["animal"]), "friend_kind": choose(self.cast["animal"])}
        parent_is = "girl" if parent in ("Mom", "Grandma") else "boy"
        for prefix, is_ in (("", hero_is), ("friend_", friend_is), ("parent_", parent_is)):
            for slot, word in zip(PRONOUNS["boy"], PRONOUNS[is_], strict=True):
                bound[prefix + slot] = word
        return bound

    def _fill(self, line: str) -> str:
        return "" if line == "-" else self.SLOT.sub(lambda slot: self._value(slot[1]), line)

    def _value(self, slot: str) -> str:
        name = slot[0].lower() + slot[1:]
        if name in self.phrases:
            value = self._fill(self._random.choice(self.phrases[name]))
        else:
            value = self._bound.get(name) or self._draw(name)
        return value[0].upper() + value[1:] if slot[0].isupper() and value else value

    def _draw(self, name: str) -> str:
        first, value = name.rstrip("2"), None
        while value in (None, self._bound.get(first), self._bound.get(first + "2")):
            value = self._fill(self._random.choice(self.words[first]))
        self._bound[name] = value
        return value


def write_demo_corpus(
    data_dir: Path, n_stories: int = PrepareSettings.demo_stories, seed: int = 42, overwrite: bool = False
) -> Path:
    """Return train/demo.txt with that many stories; written if it is not there as asked for."""
    path, about = data_dir / "train" / "demo.txt", data_dir / "train" / "demo.json"
    refuse_other_text(data_dir, "demo", {"train": path.name})
    asked = {"n_stories": n_stories, "seed": seed, "grammar_sha256": sha256_file(GRAMMAR)}
    if path.is_file():
        written, sha256 = read_json(about), sha256_file(path)
        if written == asked | {"sha256": sha256}:
            return path
        if written.get("sha256") != sha256 and not overwrite:
            raise ValueError(f"{path}: edited since it was written; --overwrite writes the demo stories anew")
    note(f"writing {n_stories:,} stories to {path}")
    teller = StoryTeller(GRAMMAR, seed)
    text = "".join(f"{teller.story()}\n<|endoftext|>\n" for _ in range(n_stories))
    path.unlink(missing_ok=True)  # in this order a run that is killed here leaves nothing that looks edited
    write_json(about, asked | {"sha256": hashlib.sha256(text.encode("utf-8")).hexdigest()})
    write_whole(path, text)
    return path
