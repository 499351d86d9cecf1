"""The forms of sentence that questions are made of, as regular expressions over one sentence.

All are narrow on purpose: a sentence that does not match makes no question, one that matches by accident a bad one.
"""

from __future__ import annotations

import re

from squeezed.evaluation.suites.words import NUMBER_WORDS

_APOSTROPHE = "'\u2019"
_QUOTED = '["\u201c][^"\u201c\u201d]{3,60}["\u201d]'
_WORD = rf"[\w{_APOSTROPHE}-]+"

# Dates and numbers.
MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
YEAR = r"(?:1[0-9]\d\d|20\d\d)"
_LONE_YEAR = (
    r"(?:(?<=\bin )|(?<=\bIn )|(?<=\bsince )|(?<=\bSince )|(?<=\buntil )|(?<=\bby )|(?<=\bBy )|(?<=\bfrom )|(?<=\bof )"
    rf"|(?<=\bbefore )|(?<=\bafter )|(?<=\byear )|(?<=\bbetween )|(?<=\d\d\d\d and )|(?<=\()){YEAR}(?! [a-z]{{3,}}s\b)"
)
DATE = (
    rf"(?:\b\d{{1,2}} {MONTH}(?:,? {YEAR})?|\b{MONTH} \d{{1,2}}(?!\d)(?:,? {YEAR})?|\b{MONTH} {YEAR}|{_LONE_YEAR})"
    r"\b(?![%.,]?\d|%|s\b)"
)
_WORDS_FOR_NUMBERS = "|".join(sorted(NUMBER_WORDS, key=len, reverse=True))
NUMBER = rf"(?:\d{{1,3}}(?:,\d{{3}})+|\d+(?:\.\d+)?|(?:{_WORDS_FOR_NUMBERS}))"
SCALED = rf"{NUMBER}(?: (?:hundred|thousand|million|billion|trillion)(?: and {NUMBER})?)*"
FIGURE = re.compile(
    rf"(?<![\w$\u20ac\u00a3.,:/-])(?!{YEAR}\b){SCALED}(?= (?!(?:and|or|to|of)\b)[a-z]{{3,}}|%)(?![\w-])", re.IGNORECASE
)
MONEY = re.compile(r"[$\u20ac\u00a3]\d+(?:,\d{3})*(?:\.\d+)?(?: (?:thousand|million|billion))?(?![\w-])")
# Before a number that belongs to a name (Windows 95), to a range (8 or 9), or that may be a year.
NOT_A_COUNT = re.compile(
    rf"[A-Z][\w.{_APOSTROPHE}-]* $|{NUMBER} (?:or|to|and|out of) $|[\u2013-]$|\b(?:in|since|until|by|between|from) $"
)
REFERENCE = re.compile(r"\b(chapter|section|appendix|figure|table|page) (\d+(?:\.\d+)*)\b", re.IGNORECASE)


# Names.
_BEGINNERS = (
    "If|When|While|Where|Whereas|Although|Though|Because|Since|But|And|Or|So|Then|In|At|On|By|For|From|To|As|Even|Only"
    "|After|Before|Until|Till|Unless|Like|Unlike|With|Without|Perhaps|Maybe|Yet|Now|Both|Is|Was|Did|Does|Can|Could|The"
    "|That|This|These|Those|What|Why|How|Who|Not|No|Just|Did|Most|Many|Some|All|Every|Each|Our|My|His|Her|Their|Its"
)
NAME_WORD = rf"(?!(?:{_BEGINNERS})\b)[A-Z][a-z\u00e0-\u00ff]+(?:[{_APOSTROPHE}-][A-Z][a-z]+)*"
PROPER = rf"{NAME_WORD}(?: {NAME_WORD}){{1,2}}"
PERSON = re.compile(rf"\b{NAME_WORD}(?: [A-Z]\.)?(?: {NAME_WORD}){{1,2}}\b")
_NO_ROLE = "over|under|after|ever|never|other|another|either|neither|whether|rather|later|earlier|however|for|or|nor"
_ROLE = (
    rf"(?!(?:{_NO_ROLE})\b)[a-z]+"
    r"(?:er|or|ist|ian|eer|man|woman|cook|friend|cousin|captain|chief|mechanic|president|secretary)"
)
BEFORE_PERSON = re.compile(rf"(?:\b(?:by|named|called|met|asked|told|{_ROLE}),?|\b(?:Dr|Mr|Mrs|Ms|Prof)\.) $")
AFTER_PERSON = re.compile(
    r",? (?:said|says|wrote|writes|told|tells|asked|taught|found|discovered|built|made|started|founded|won|joined|gave"
    r"|came|went|paid|met|led|designed|invented|visited|proposed|suggested|argued|who)\b"
)
PART_OF_A_NAME_BEFORE = re.compile(rf"(?:\b[A-Z][\w.{_APOSTROPHE}-]*|[&(\"\u201c]|\b[A-Z]{_WORD} of(?: the)?) $")
PART_OF_A_NAME_AFTER = re.compile(rf"(?:[{_APOSTROPHE}](?!s\b)|-| [A-Z&\d]| (?:of|and|the|de|von) (?:the )?[A-Z])")
TITLE = re.compile(r"^(?:Dr|Mr|Mrs|Ms|Prof|Professor|Captain|Sir)\.? ")
TITLED_BEFORE = re.compile(r"\b(?:Dr|Mr|Mrs|Ms|Prof)\. $")
PERSONS = re.compile(
    r"(?:er|or|ist|ian|eer|man|woman|captain|chief|cook|king|queen|head|mechanic|pilot|champion|president|steward|guard"
    r"|clerk|coach|boss|minister|scientist|saint|guide|nurse|mother|father|sister|brother|wife|husband|friend|host)$"
)

VAGUE = re.compile(
    r"\b(?:first|second|third|last|next|other|one|ones|same|latter|former|result|problem|answer|question|reason|point"
    r"|difference|example|thing|way|idea|rest|case)$"
)

# A noun phrase of simple build: what follows it is the verb.
_STOP = (
    r"(?!(?:of|on|in|at|for|from|to|by|with|and|or|but|as|if|than|who|that|which|is|are|was|were|has|have|had|he|she|it"
    r"|they|we|you|I|not|never|only|also|this|these|those|there|then|so)\b)"
)
_NOUN = rf"{_STOP}{_WORD}"
_NOUNS = rf"{_NOUN}(?: {_NOUN}){{0,2}}"
_WHERE = rf"(?: (?:of|on|in|at|for|from|behind|inside) (?:the |a |an |its )?{_NOUNS})?"
_WHO = rf"(?: (?:who|that|which|where|responsible for) (?!(?:is|are|was|were)\b)(?:{_WORD} ?){{1,6}}?)?"
_SUBJECT = rf"(?P<subject>(?:[Tt]he|Our) {_NOUNS}{_WHERE}{_WHO}|{PROPER})"
_CLAUSE = r"(?:^|(?<=[;:] )|(?<=, and )|(?<=, but ))"
_END = r"(?=[,.;:]| (?:and|but|who|which|that|where|on|in|at|by|to|from|for|because|since|after|before|when)\b)"
_NAME_PART = rf"{NAME_WORD}(?:[{_APOSTROPHE}]s)?"
_NAME = rf"(?:[Tt]he |a |an )?(?:Dr\. )?{_NAME_PART}(?: (?:(?:of|and|the|von|de|is) )?{_NAME_PART}){{0,3}}"
_NAMED = rf"(?P<answer>{_QUOTED}|{_NAME})"

IS_CALLED = re.compile(
    rf"{_CLAUSE}{_SUBJECT} (?P<be>is|are|was|were) (?P<how>called|named|nicknamed|known as) {_NAMED}{_END}"
)
IS = re.compile(rf"{_CLAUSE}{_SUBJECT} (?P<be>is|was|are|were) {_NAMED}{_END}")
CALLED = re.compile(rf"\b(?:called|named|nicknamed|known as|dubbed|termed) {_NAMED}{_END}")
DONE_BY = re.compile(
    rf"^{_SUBJECT} (?P<be>was|were) (?P<done>{_NOUN}(?: {_WORD}){{0,6}}?) by (?:the )?(?:[a-z]+ ){{0,3}}"
    rf"(?P<answer>{PROPER}){_END}"
)
DONE_WHEN = re.compile(
    rf"^{_SUBJECT} (?P<be>was|were) (?P<done>{_NOUN}(?: (?!in\b|on\b){_WORD}){{0,5}}) (?:in|on) (?P<answer>{DATE})"
)
HAPPENED = {
    "struck": "strike", "began": "begin", "started": "start", "ended": "end", "opened": "open", "closed": "close",
    "arrived": "arrive", "died": "die", "happened": "happen", "occurred": "occur", "appeared": "appear",
    "took place": "take place", "broke out": "break out", "reopened": "reopen",
}  # fmt: skip
HAPPENED_WHEN = re.compile(rf"^{_SUBJECT} (?P<verb>{'|'.join(HAPPENED)}) (?:in|on) (?P<answer>{DATE})(?=[,.;]| and\b)")
_BASES = (
    "hold", "contain", "carry", "need", "cost", "weigh", "last", "draw", "bear", "use", "cover", "seat", "serve",
    "produce", "require", "burn", "take", "have",
)  # fmt: skip
_THIRD = {"carry": "carries", "have": "has"}
_PAST = {"hold": "held", "have": "had", "take": "took", "carry": "carried", "use": "used", "weigh": "weighed",
         "last": "lasted", "contain": "contained", "need": "needed"}  # fmt: skip
VERBS = (
    {base: ("do", base) for base in _BASES}
    | {_THIRD.get(base, base + "s"): ("does", base) for base in _BASES}
    | {past: ("did", base) for base, past in _PAST.items()}
)
_NO_UNIT = "and|which|that|in|on|at|for|with|from|when|if|to|every|per|by|until|or|but|than"
_UNIT = rf"(?P<unit>[a-z]{_WORD}(?: (?!(?:{_NO_UNIT})\b)[a-z]{_WORD}){{0,2}}?(?: of [a-z]{_WORD})?)"
_ABOUT = r"(?:(?:about|around|roughly|nearly|almost|over|only|up to|at least|more than|exactly|perhaps) )?"
HOW_MANY = re.compile(
    rf"^{_SUBJECT} (?P<verb>{'|'.join(VERBS)}) {_ABOUT}(?P<answer>{NUMBER}) {_UNIT}"
    rf"(?P<rest>(?: (?:in|on|at|for|per|with|from) [\w {_APOSTROPHE}-]{{3,30}}?)?)(?=[.,;:]| and | which | that )"
)
HOW_HIGH = re.compile(
    rf"^{_SUBJECT} (?P<be>is|was|are|were) {_ABOUT}(?P<answer>{NUMBER}) (?P<unit>[a-z]{{3,}}) "
    r"(?P<how>high|long|wide|deep|tall|old|thick|heavy)(?=[,.;:]| and\b)"
)
