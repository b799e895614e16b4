"""Words of a caption, as caption scores count them.

What this file teaches: a score on words depends on what a word is. Published BLEU, ROUGE-L and CIDEr figures use the
Penn Treebank's idea of it: "a man's dog doesn't." is `a man 's dog does n't`, and the full stop is dropped. The usual
program for this (Stanford's PTBTokenizer, called by pycocoevalcap) needs Java; this file does the same in plain `re`.

How it works: at each place every rule below is tried, the one that matches the longest stretch of text wins, and its
group 1 is the token; what a rule matches beyond its group is context. The first rule wins a draw.

Where it stops: the rules are those that captions need. The Java program cuts some other things differently: web and
e-mail addresses, phone numbers, HTML entities, rare abbreviations, ’ as an opening mark or inside a word (o’clock),
and a single letter at the very end ("plan b."), where the first word of the *next* caption in its file decides.
On 3,065 captions of Flickr8k the two agree in every word.
"""

import re
import unicodedata

# Dropped after tokenization (list of pycocoevalcap). It also lists -LRB- and other brackets in capitals, but its
# tokens are lower-case, so brackets stay in as the words "-lrb-", "-rrb-", … ; so do they here. "?!" and "!!" stay too.
DROPPED = re.compile(r"''?|``?|[.?!,:;-]|--{1,3}|\.{3,5}")

LETTER, ALNUM = r"[^\W\d_]", r"[^\W_]"
CLITIC = r"'(?:[sSmMdD]|re|ve|ll|RE|VE|LL)"
# Abbreviations whose full stop belongs to them, in any case …
ABBREVIATION = (
    "jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri|"
    "ala|ariz|calif|colo|conn|fla|ga|ind|kans?|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn|va|vt|wisc?|wyo|"
    "mr|mrs|ms|drs?|profs?|sens?|reps?|lt|col|gen|govs?|adm|rev|maj|sgt|cpl|pvt|mt|capt|ste?|ave|pres|lieut|hon|"
    "jr|sr|bros|blvd|rd|esq|inc|cos?|corp|ltd|dept|assn|univ|intl|mfg|bldg|sq|ft|tel|est|ext|etc|al|seq|vs|cf"
)
# … and some only with a capital, because the word itself is common ("a cat is ill.").
CAPITAL_ABBREVIATION = "Ark|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
# A letter before one of these ends a sentence ("plan B. The dog"); before another word it is an initial ("J. Smith").
BEGINNING = "A|An|As|At|But|He|Her|Here|If|In|It|One|She|Some|That|The|Then|There|These|They|This|We|When|While"
ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"

_RULES = [
    # words and their endings
    r"([cC]an|CAN)(?i:not)\b", r"((?i:gon|wan))(?i:na)\b", r"((?i:got))(?i:ta)\b", r"((?i:gim|lem))(?i:me)\b",
    r"('[tT])(?i:is|was)\b",
    rf"({LETTER}+)",
    rf"({LETTER}+){CLITIC}",  # man|'s
    r"([A-Za-z]*[A-MO-Za-mo-z])[nN]'[tT]",  # does|n't
    rf"({CLITIC})(?:[^A-Za-z]|$)", r"([nN]'[tT])",
    # hyphens and apostrophes inside words: t-shirt, 4-year-old, o'clock, d'angelo, ma'am, 'em, '90s, 'n', y'|all
    rf"((?:[dDoOlL]'{ALNUM})?{ALNUM}+(?:[-_](?:[dDoOlL]'{ALNUM})?{ALNUM}+)*)",
    rf"([A-HJ-XZ]'{LETTER}{{2,}}|{LETTER}+[aeiouyAEIOUY]'[aeiouA-Z]{LETTER}*|[lLdDjJ]'|'[nN]'?)",
    r"('[2-9]0s|'(?i:em|till?|cause)|(?i:ol'|somethin'|c'mon|cap'n|nor'easter|li'l|s'mores))",
    rf"([yY]'){LETTER}", r"('\d\d)(?:\s|$)",
    # numbers (3,000 10:30 -5 .5), dates, fractions, measures (3.5-inch)
    r"([-+]?(?:\d*(?:[.:,]\d+)+|\d+))",
    r"(\d{1,2}[-/]\d{1,2}[-/]\d{2,4}|\d{1,4}/\d{1,4})",
    rf"([A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:{ACRONYM}\.|[A-Za-z0-9]+))+)",
    # two words that a sign joins: black/white, AT&T, end.Start, what?No
    r"([A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2})",
    r"([A-Z]+(?:[+&][A-Z]+)+)",
    rf"({LETTER}{ALNUM}*(?:\.{LETTER}{ALNUM}*)+)", rf"({LETTER}+(?:[?!]{LETTER}+)+)",
    # full stops that belong to a word: etc. Mr. J. U.S. No.|5, and any before another mark: dog.|,
    rf"({ACRONYM}\.?)", rf"((?i:{ABBREVIATION}|ph\.d)\.|(?:{CAPITAL_ABBREVIATION})\.)",
    rf"([A-Za-z]\.)(?!\s*$|\s+(?:{BEGINNING})\s)", r"([nN][oO][sS]?\.)\s?\d", rf"({LETTER}+\.)[,;:]",
    # signs
    r"('')", r"(``)", r"(\.{3,5})", r"(-+)", r"([?!]+)", r"(\*+)", r"(@+)", r"(#+)", r"(_+)", r"([A-Z]*\$)",
    r"([@#][A-Za-z]\w*)",  # @user, #tag
    r"(</?[A-Za-z!][^>]*>)",  # <unk>
    r"([:;=][-o*']?[()DdPpO3\[{|@])(?!\w)",  # :-)
    r"(')[A-Za-z]\S",  # an opening quotation mark, rather than the ending in 'sunny'
]  # fmt: skip
RULES = [re.compile(rule) for rule in _RULES]

# One sign written as another, before the rules look …
BEFORE = str.maketrans({"’": "'", "‘": "`", "‛": "'", "“": '"', "”": '"', "«": '"', "»": '"'})
# … and in the tokens. (Brackets: those of pycocoevalcap's own tokens, see DROPPED.)
AFTER = {"[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", '"': "''", "…": "...", "–": "--", "—": "--",
         "£": "#", "€": "$", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4"}  # fmt: skip


def ptb_tokens(caption: str) -> list[str]:
    """The words of a caption: lower-case, contractions split, punctuation dropped. "It's a dog." → it, 's, a, dog."""
    text, at, tokens = caption.translate(BEFORE), 0, []
    while at < len(text):
        seen = [match for rule in RULES if (match := rule.match(text, at))]
        # max() keeps the first of equals. A sign without a rule, or a space, is taken alone.
        token = max(seen, key=lambda match: match.end()).group(1) if seen else text[at]
        at += len(token)
        if _visible(token):
            tokens.append(AFTER.get(token, token.replace("(", "-lrb-").replace(")", "-rrb-")).lower())
    # Split once more: a token such as <a b> holds a space, and pycocoevalcap's scores count two words.
    return " ".join(token for token in tokens if not DROPPED.fullmatch(token)).split()


def _visible(token: str) -> bool:
    """Spaces, control characters and signs beyond the 16-bit plane (emoji) are no words."""
    return not token.isspace() and unicodedata.category(token[0])[0] != "C" and ord(token[0]) < 0x10000
