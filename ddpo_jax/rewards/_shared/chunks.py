"""Noun chunks of English prompts by rules: "a black and white cat sits on the mat" has "a black and white cat" and
"the mat".

A chunk is a run of determiners, adjectives and nouns. It ends at function words, verbs and most punctuation; commas and
"and" between adjectives stay in it, as in spaCy's ``noun_chunks``, the definition of T2I-CompBench. Unlike there,
pronouns and the "front" of "in front of" are no chunks. Words of the closed classes are listed; of the open classes the
lists hold what image prompts use most, endings decide the rest, and an unknown word is a noun. This is no parser: for
numbers that compare with published ones, let spaCy chunk the prompts.
"""

from __future__ import annotations

import dataclasses
import re

_TOKEN = re.compile(r"side by side|\w+(?:['’:.-]\w+)*|[^\w\s]", re.IGNORECASE)

_DETERMINERS = frozenset(
    """
    a an the this these those my your his her its our their some any no each every all several many few both another
    zero one two three four five six seven eight nine ten eleven twelve dozen hundred thousand
    """.split()
)
_AUXILIARIES = frozenset(
    """
    is are was were be been being am has have had having do does did can could will would shall should may might must
    get gets got isn't aren't wasn't weren't doesn't don't can't
    """.split()
)
_FUNCTION = (
    _AUXILIARIES
    | frozenset(
        """
    about above across after against along alongside amid among amongst around as at atop away back before behind below
    beneath beside besides between beyond by despite down during except for from in inside into like near nearby next
    of off on onto opposite out outside over past per since through throughout till to together toward towards under
    underneath until up upon versus via vs while with within without
    and or but nor so yet if because although though than whether where when whenever who whom whose which what that
    there here how why not just also then now ever never always often still again apart else front
    i you he she it we they me him us them himself herself itself themselves myself who's it's there's everyone
    everything someone something nothing
    """.split()
    )
    | {"side by side"}
)
_JOINS = frozenset("and or & ,".split())
_ADVERBS = frozenset("very too quite rather more most less least almost extremely".split())  # inside a chunk as well
_NOT_ADVERBS = frozenset(
    """
    family fly lily butterfly dragonfly firefly jelly belly rally bully ally assembly dolly holly supply monopoly
    anomaly curly friendly lovely ugly silly woolly wooly prickly elderly lonely lively early bubbly wrinkly daily hilly
    smelly chilly gnarly burly jolly oily pearly squiggly wiggly wobbly crinkly cuddly deadly heavenly
    """.split()
)
_ADJECTIVES = frozenset(
    """
    red orange yellow green blue purple pink brown black white gray grey beige tan cyan magenta maroon navy teal violet
    indigo turquoise crimson scarlet silver golden blond blonde colorful colourful multicolored bright dark light pale
    big large huge giant enormous gigantic small little tiny miniature tall short long narrow wide broad thin thick fat
    slim high low deep flat shallow heavy massive grand
    round square oval rectangular triangular circular cubic cylindrical conical spherical pyramidal pentagonal hexagonal
    octagonal oblong crescent curved straight angular pointed rounded diamond teardrop
    fluffy soft hard rough smooth shiny matte glossy sharp dull sleek crisp fuzzy furry bumpy spiky jagged silky sticky
    slimy prickly wet dry damp icy hot warm cool cold frozen fresh ripe juicy crunchy crispy sweet sour tender raw rusty
    dusty dirty muddy clean clear cloudy sunny rainy snowy foggy misty stormy opaque translucent transparent plain plush
    old young new ancient modern vintage antique rustic futuristic retro classic medieval traditional victorian
    happy sad angry cute beautiful pretty handsome adorable majestic elegant cozy comfortable calm quiet busy empty full
    open closed wild gentle fierce strong weak brave lazy hungry thirsty tired sleepy delicate sturdy lush vibrant vivid
    abstract surreal realistic cinematic magical fantasy cartoon other same different various single double male female
    bare blank broken cracked torn twin main left right tart spare dim bulky loose tight rich poor odd only wooden
    woolen tiled striped dotted checkered spotted parked
    """.split()
)
_MATERIALS = frozenset(
    """
    metal plastic glass leather rubber fabric wood stone marble concrete paper cotton silk velvet satin wool steel iron
    gold bronze copper brass brick ceramic porcelain clay bamboo denim lace straw burlap aluminum aluminium crystal
    """.split()
)
_ADJECTIVE_ENDING = re.compile(r"\w{2,}(?:ful|less|ous|ish|able|ible|ical|allic|astic|etic|like|-\w+ed)$")
_ING_NOUNS = frozenset(
    """
    building painting drawing ring king string ceiling wing swing spring thing evening morning wedding clothing earring
    pudding railing awning carving sibling duckling sapling seedling sling lightning offspring icing frosting stuffing
    dumpling filling wrapping lighting flooring siding plumbing topping paving sing ping icing dressing bedding meeting
    landing opening setting gathering topiary crossing scaffolding
    """.split()
)
# Verbs whose forms are hardly ever nouns: they end a chunk wherever they follow its noun.
_VERBS = """
    sit stay lie wear hold eat bring carry contain include feature provide attract protect illuminate depict portray
    resemble surround follow chase throw catch ride drive fly swim climb sing read write draw speak listen sleep stare
    gaze peer lean kneel crouch crawl float drift hover glide sail graze perch bounce sparkle gleam glisten shimmer glow
    shine melt boil stir bake drink chew hug kiss smile laugh cry fight push pull drag lift wave jump leap hop explore
    enjoy prepare cook serve pour contrast hang stand reflect become remain seem appear look keep make take give show go
    come begin rustle sway flutter
"""
_PAST = frozenset(
    """
    sat lay lain wore worn held ate eaten brought drove flew swam sang wrote drew spoke slept shone drank kept made took
    taken gave given went came became began stood hung led lit fell grew sped spun ran threw thrown caught rode told
    woke sank swept struck blew built bent clung dug fed fought hid knelt lent lost sent shook sold sought spent stole
    stuck swung taught tore wept wove cast seen done gone
    """.split()
)
# Verbs that are nouns as well: they end a chunk only where a phrase follows, and in the plural only after a plural.
_EITHER = """
    rest display mix nap shape slice beat pound hook walk run play watch face cross hit kick fall land flash mark
    release spread line flank dance race bloom drip burn flow light cut pose park swing touch view point guard
    jot cradle frame paint grow reach use work help load roll turn move pass measure bark cushion crowd rise cover fill
    wrap adorn decorate
"""
_PLURALS = frozenset("people men women children sheep fish deer mice geese feet teeth police cattle".split())


def _third_person(verb: str) -> str:
    if verb.endswith(("s", "sh", "ch", "x", "o")):
        return verb + "es"
    return verb[:-1] + "ies" if re.search(r"[^aeiou]y$", verb) else verb + "s"


def _regular_past(verb: str) -> str:
    return verb + "d" if verb.endswith("e") else verb[:-1] + "ied" if re.search(r"[^aeiou]y$", verb) else verb + "ed"


_VERB_FORMS = _PAST | {
    form for verb in _VERBS.split() for form in (verb, _third_person(verb), _regular_past(verb), verb + verb[-1] + "ed")
}
_EITHER_BASE = frozenset(_EITHER.split())
_EITHER_THIRD = frozenset(_third_person(verb) for verb in _EITHER_BASE)


@dataclasses.dataclass
class _Chunk:
    """The chunk that is being read."""

    before: str = ""  # the word that ended what came before
    joined: bool = False  # "and" or a comma joins it to another chunk
    words: list[int] = dataclasses.field(default_factory=list)  # indices of its tokens
    determined: bool = False  # has a determiner
    noun: bool = False  # has a word that is neither determiner nor adjective


def noun_chunks(text: str) -> list[str]:
    """The noun chunks of an English text, in order and as they are written there."""
    tokens = list(_TOKEN.finditer(text))
    words = [token[0].lower() for token in tokens]
    found: list[list[int]] = []
    chunk = _Chunk()
    for i, word in enumerate(words):
        following = words[i + 1] if i + 1 < len(words) else ""
        joins = word in _JOINS
        beyond = words[i + 2] if word == "," and following in _JOINS and i + 2 < len(words) else following
        if _is_content(word, following) and not _is_verb(words, i, chunk):
            chunk.words.append(i)
            chunk.noun |= not _is_adjective(word)
        elif word in _DETERMINERS and not chunk.noun and (chunk.determined or not chunk.words):
            chunk.words.append(i)
            chunk.determined = True
        elif chunk.words and not chunk.noun and (joins or _is_adverb(word)) and _is_content(beyond):
            chunk.words.append(i)
        else:
            kept = _kept(chunk, words)
            found += [kept] if kept else []
            chunk = _Chunk(word, joins and bool(kept or (chunk.joined and not chunk.words)))
            if word in _DETERMINERS:
                chunk.words, chunk.determined = [i], True
    found += [_kept(chunk, words)]
    return [text[tokens[kept[0]].start() : tokens[kept[-1]].end()] for kept in found if kept]


def _kept(chunk: _Chunk, words: list[str]) -> list[int]:
    """The tokens of the chunk without joining words at its end; empty where it is none."""
    kept = chunk.words
    while kept and not _is_content(words[kept[-1]]):
        kept = kept[:-1]
    if kept and not (chunk.determined or chunk.noun or words[kept[-1]] in _MATERIALS):
        # Adjectives alone are a noun after a preposition, "a woman in pink"; not in "the wall is white".
        return kept if chunk.before in _FUNCTION - _AUXILIARIES else []
    return kept


def _is_adverb(word: str) -> bool:
    return word in _ADVERBS or (word.endswith("ly") and len(word) > 4 and word not in _NOT_ADVERBS)


def _is_adjective(word: str) -> bool:
    return word in _ADJECTIVES or word in _MATERIALS or bool(_ADJECTIVE_ENDING.fullmatch(word))


def _is_content(word: str, following: str = "") -> bool:
    """Whether it is a word of the open classes."""
    if word == "can":  # "a soda can and a cup"; not "a dog can swim"
        return not _is_content(following)
    return word[:1].isalnum() and word not in _FUNCTION and word not in _DETERMINERS and not _is_adverb(word)


def _is_verb(words: list[str], i: int, chunk: _Chunk) -> bool:
    """Whether content word ``i`` is a verb, given the chunk that it would go on or begin."""
    word, previous = words[i], words[i - 1] if i else ""
    following = words[i + 1] if i + 1 < len(words) else ""
    ing = word.endswith("ing") and len(word) > 4 and word not in _ING_NOUNS
    ed = word.endswith("ed") and len(word) > 4
    if not chunk.words:
        if previous in _AUXILIARIES:  # "is sitting", "was hung"
            return ing or ed or word in _VERB_FORMS
        return word in _VERB_FORMS or (ing and previous in _FUNCTION and previous not in _JOINS)
    if not chunk.noun:  # "a flying bird", "the cut"; but "the yellow light shone"
        return word in _PAST and previous in _ADJECTIVES
    if ing or word in _VERB_FORMS:
        return True
    if _is_content(following):
        return False  # "a snow covered street"
    if not following or following in _JOINS or following == ".":
        return ed  # "a dog, seated"; but "a wall clock and a gold watch"
    plural = chunk.joined or previous in _PLURALS or bool(re.search(r"[^su]s$", previous))
    return ed or word in _EITHER_THIRD or (word in _EITHER_BASE and plural)
