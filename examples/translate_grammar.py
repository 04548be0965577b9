"""A small grammar that writes English sentences together with their French translations.

Statements, negations and questions with *to be* and *to have*: pronouns and noun phrases as
subjects, articles, possessives, numbers, professions, things, and adjectives that agree in gender
and number and stand before or behind the noun. Tens of thousands of sentences, of which each has
exactly one translation. Where English says less than French must know, the grammar decides:

* *you* is *tu*, and *vous* where the noun that follows is plural (*you are students*);
* people are masculine unless a word says otherwise (*she*, *my sister*, *actress*).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

__all__ = ["Pair", "join", "sentence_pairs", "split"]

Pair = tuple[str, str]

# English singular and plural; French masculine singular and plural, feminine singular and plural.
PEOPLE = """
student students étudiant étudiants étudiante étudiantes
teacher teachers professeur professeurs professeure professeures
lawyer lawyers avocat avocats avocate avocates
engineer engineers ingénieur ingénieurs ingénieure ingénieures
baker bakers boulanger boulangers boulangère boulangères
farmer farmers agriculteur agriculteurs agricultrice agricultrices
singer singers chanteur chanteurs chanteuse chanteuses
dancer dancers danseur danseurs danseuse danseuses
nurse nurses infirmier infirmiers infirmière infirmières
cook cooks cuisinier cuisiniers cuisinière cuisinières
writer writers écrivain écrivains écrivaine écrivaines
musician musicians musicien musiciens musicienne musiciennes
director directors directeur directeurs directrice directrices
seller sellers vendeur vendeurs vendeuse vendeuses
doctor doctors médecin médecins médecin médecins
painter painters peintre peintres peintre peintres
artist artists artiste artistes artiste artistes
dentist dentists dentiste dentistes dentiste dentistes
journalist journalists journaliste journalistes journaliste journalistes
pupil pupils élève élèves élève élèves
friend friends ami amis amie amies
actor actors acteur acteurs - -
actress actresses - - actrice actrices
waiter waiters serveur serveurs - -
waitress waitresses - - serveuse serveuses
"""

FAMILY = """
man men homme hommes - -
woman women - - femme femmes
boy boys garçon garçons - -
girl girls - - fille filles
brother brothers frère frères - -
sister sisters - - sœur sœurs
uncle uncles oncle oncles - -
aunt aunts - - tante tantes
cousin cousins cousin cousins - -
neighbour neighbours voisin voisins - -
"""

THINGS = """
car cars - - voiture voitures
house houses - - maison maisons
watch watches - - montre montres
table tables - - table tables
apple apples - - pomme pommes
orange oranges - - orange oranges
key keys - - clé clés
shirt shirts - - chemise chemises
book books livre livres - -
garden gardens jardin jardins - -
umbrella umbrellas parapluie parapluies - -
tree trees arbre arbres - -
computer computers ordinateur ordinateurs - -
coat coats manteau manteaux - -
boat boats bateau bateaux - -
dog dogs chien chiens - -
cat cats chat chats - -
horse horses cheval chevaux - -
bird birds oiseau oiseaux - -
"""

# English; French masculine, the same before a vowel, masculine plural, feminine, feminine plural.
BEFORE_THE_NOUN = """
good bon bon bons bonne bonnes
big grand grand grands grande grandes
small petit petit petits petite petites
young jeune jeune jeunes jeune jeunes
pretty joli joli jolis jolie jolies
old vieux vieil vieux vieille vieilles
new nouveau nouvel nouveaux nouvelle nouvelles
beautiful beau bel beaux belle belles
"""

BEHIND_THE_NOUN = """
famous célèbre célèbre célèbres célèbre célèbres
rich riche riche riches riche riches
sad triste triste tristes triste tristes
ill malade malade malades malade malades
calm calme calme calmes calme calmes
tired fatigué fatigué fatigués fatiguée fatiguées
busy occupé occupé occupés occupée occupées
strong fort fort forts forte fortes
patient patient patient patients patiente patientes
intelligent intelligent intelligent intelligents intelligente intelligentes
happy heureux heureux heureux heureuse heureuses
serious sérieux sérieux sérieux sérieuse sérieuses
French français français français française françaises
Italian italien italien italiens italienne italiennes
German allemand allemand allemands allemande allemandes
"""

COLOURS = """
red rouge rouge rouges rouge rouges
yellow jaune jaune jaunes jaune jaunes
black noir noir noirs noire noires
green vert vert verts verte vertes
white blanc blanc blancs blanche blanches
grey gris gris gris grise grises
"""

# English; French masculine, before a vowel, feminine, plural.
DETERMINERS = """
the le l' la les
my mon mon ma mes
your ton ton ta tes
his son son sa ses
her son son sa ses
our notre notre notre nos
their leur leur leur leurs
"""

NUMBERS = {"two": "deux", "three": "trois", "four": "quatre", "ten": "dix"}

# Person and number to the forms of "be" and "have" in English and in French.
BE = {
    "1s": ("am", "suis"),
    "2s": ("are", "es"),
    "3s": ("is", "est"),
    "1p": ("are", "sommes"),
    "2p": ("are", "êtes"),
    "3p": ("are", "sont"),
}
HAVE = {
    "1s": ("have", "ai"),
    "2s": ("have", "as"),
    "3s": ("has", "a"),
    "1p": ("have", "avons"),
    "3p": ("have", "ont"),
}
PRONOUNS = {
    "1s": ("I", "je", "je"),
    "2s": ("you", "tu", "tu"),
    "1p": ("we", "nous", "nous"),
    "2p": ("you", "vous", "vous"),
    "3p": ("they", "ils", "elles"),
}


def _rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.strip().splitlines()]


def _starts_with_vowel(word: str) -> bool:
    return word[0] in "aeiouéêèœ" or word in ("homme", "hommes")


def _elided(word: str, following: str) -> str:
    """*je*, *ne* and *de* lose their vowel before another one."""
    return word[:-1] + "'" if _starts_with_vowel(following) else word


@dataclass
class Noun:
    """A noun in one number, in both languages."""

    english: str
    french: str
    feminine: bool
    plural: bool


@dataclass
class Subject:
    """Words of a subject, and what a verb and an adjective have to agree with."""

    english: list[str]
    french: list[str]
    person: str
    feminine: bool
    is_pronoun: bool

    @property
    def plural(self) -> bool:
        """Whether it is more than one."""
        return self.person.endswith("p")


class _Writer:
    """Draws sentences; every method makes its choices from the same random numbers."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.people, self.family, self.things = map(_rows, (PEOPLE, FAMILY, THINGS))
        self.before, self.behind = _rows(BEFORE_THE_NOUN), _rows(BEHIND_THE_NOUN)
        self.colours = _rows(COLOURS)
        self.determiners = _rows(DETERMINERS)

    def sentence(self) -> Pair:
        """One sentence: a statement, its negation or a question."""
        write = self.random.choice((self.is_adjective, self.is_person, self.has_thing))
        form = self.random.choice(("statement", "statement", "negation", "question"))
        english, french = write(form)
        return join(english), join(french)

    def noun(self, row: Sequence[str], plural: bool, feminine: bool = False) -> Noun:
        """A noun in the gender asked for, or in the only one it has."""
        feminine = row[2] == "-" or (feminine and row[4] != "-")
        return Noun(row[plural], row[2 + 2 * feminine + plural], feminine, plural)

    def adjective(self, row: Sequence[str], feminine: bool, plural: bool, following: str) -> str:
        """The French form that agrees."""
        if feminine:
            return row[4 + plural]
        if plural:
            return row[3]
        return row[2 if following and _starts_with_vowel(following) else 1]

    def described(self, noun: Noun, colours: bool = False) -> tuple[list[str], list[str], bool]:
        """A noun with an adjective or without; also whether one stands before it in French."""
        kind = self.random.choice(("none", "before", "behind"))
        if kind == "none":
            return [noun.english], [noun.french], False
        if kind == "before":
            row = self.random.choice(self.before)
            adjective = self.adjective(row, noun.feminine, noun.plural, noun.french)
            return [row[0], noun.english], [adjective, noun.french], True
        row = self.random.choice(self.colours if colours else self.behind)
        adjective = self.adjective(row, noun.feminine, noun.plural, "")
        return [row[0], noun.english], [noun.french, adjective], False

    def with_determiner(self, noun: Noun, english: list[str], french: list[str]) -> None:
        """Put an article or a possessive in front of both phrases."""
        row = self.random.choice(self.determiners)
        if noun.plural:
            form = row[4]
        elif _starts_with_vowel(french[0]):
            form = row[2]
        else:
            form = row[3 if noun.feminine else 1]
        english.insert(0, row[0])
        french.insert(0, form)

    def with_indefinite(
        self, noun: Noun, english: list[str], french: list[str], adjective_before: bool
    ) -> None:
        """Put *a*, *an*, *un*, *une*, *des* or *de* in front of both phrases."""
        if noun.plural:
            french.insert(0, _elided("de", french[0]) if adjective_before else "des")
            return
        english.insert(0, "an" if english[0][0] in "aeiouI" else "a")
        french.insert(0, "une" if noun.feminine else "un")

    def pronoun(self, person: str, feminine: bool) -> Subject:
        """A pronoun as the subject."""
        if person == "3s":
            words = ("she", "elle") if feminine else ("he", "il")
        else:
            words = (PRONOUNS[person][0], PRONOUNS[person][1 + feminine])
        return Subject([words[0]], [words[1]], person, feminine, True)

    def phrase(self) -> Subject:
        """A noun phrase as the subject."""
        rows = self.family if self.random.random() < 0.5 else self.people
        noun = self.noun(self.random.choice(rows), self.random.random() < 0.4)
        english, french, _ = self.described(noun)
        self.with_determiner(noun, english, french)
        return Subject(english, french, "3p" if noun.plural else "3s", noun.feminine, False)

    def subject(self) -> Subject:
        """Any subject."""
        if self.random.random() < 0.5:
            return self.phrase()
        person = self.random.choice(("1s", "2s", "3s", "3s", "1p", "3p"))
        return self.pronoun(person, person == "3s" and self.random.random() < 0.5)

    def clause(
        self,
        form: str,
        subject: Subject,
        verb: dict[str, tuple[str, str]],
        english: list[str],
        french: list[str],
    ) -> tuple[list[str], list[str]]:
        """Subject, verb and the rest, in the order of a statement, negation or question."""
        english_verb, french_verb = verb[subject.person]
        return (
            self.english_clause(form, subject, english_verb, english),
            self.french_clause(form, subject, french_verb, french),
        )

    def english_clause(self, form: str, subject: Subject, verb: str, rest: list[str]) -> list[str]:
        """*have* is asked and negated with *do*, *be* by itself."""
        does = "does" if subject.person == "3s" else "do"
        if form == "statement":
            return [*subject.english, verb, *rest]
        if verb in ("have", "has"):
            if form == "negation":
                return [*subject.english, does, "not", "have", *rest]
            return [does, *subject.english, "have", *rest, "?"]
        if form == "negation":
            return [*subject.english, verb, "not", *rest]
        return [verb, *subject.english, *rest, "?"]

    def french_clause(self, form: str, subject: Subject, verb: str, rest: list[str]) -> list[str]:
        """Questions by inversion: *es-tu ...*, *ma sœur est-elle ...*."""
        if form == "question":
            pronoun = subject.french[0]
            if not subject.is_pronoun:
                pronoun = ("elle" if subject.feminine else "il") + "s" * subject.plural
            link = "-t-" if verb == "a" else "-"
            inverted = f"{verb}{link}{pronoun}"
            return [*([] if subject.is_pronoun else subject.french), inverted, *rest, "?"]
        verbs = [verb] if form == "statement" else [_elided("ne", verb), verb, "pas"]
        words = subject.french
        if words == ["je"]:
            words = [_elided("je", verbs[0])]
        return [*words, *verbs, *rest]

    def is_adjective(self, form: str) -> tuple[list[str], list[str]]:
        """For example *they are very tired*."""
        subject = self.subject()
        row = self.random.choice(self.behind)
        english, french = [row[0]], [self.adjective(row, subject.feminine, subject.plural, "")]
        if self.random.random() < 0.3:
            english.insert(0, "very")
            french.insert(0, "très")
        return self.clause(form, subject, BE, english, french)

    def is_person(self, form: str) -> tuple[list[str], list[str]]:
        """For example *my sister is a famous singer*."""
        row = self.random.choice(self.people)
        only = "f" if row[2] == "-" else "m" if row[4] == "-" else ""
        if self.random.random() < 0.35:
            subject = self.phrase()
            while only and subject.feminine != (only == "f"):
                subject = self.phrase()
        else:
            person = self.random.choice(("1s", "2s", "3s", "3s", "1p", "2p", "3p"))
            # The noun that follows tells who "I" and "they" are.
            feminine = self.random.random() < 0.5 if person == "3s" and not only else only == "f"
            subject = self.pronoun(person, feminine)
        noun = self.noun(row, subject.plural, subject.feminine)
        english, french, adjective_before = self.described(noun)
        self.with_indefinite(noun, english, french, adjective_before)
        return self.clause(form, subject, BE, english, french)

    def has_thing(self, form: str) -> tuple[list[str], list[str]]:
        """For example *we do not have a red car*."""
        subject = self.subject()
        noun = self.noun(self.random.choice(self.things), self.random.random() < 0.4)
        english, french, adjective_before = self.described(noun, colours=True)
        kind = self.random.choice(("indefinite", "definite", "number"))
        if kind == "definite":
            self.with_determiner(noun, english, french)
        elif kind == "number" and noun.plural:
            number = self.random.choice(sorted(NUMBERS))
            english.insert(0, number)
            french.insert(0, NUMBERS[number])
        else:
            before = french[0]
            self.with_indefinite(noun, english, french, adjective_before)
            if form == "negation":
                # "pas de voiture", and not "pas une voiture".
                french[0] = _elided("de", before)
        return self.clause(form, subject, HAVE, english, french)


def split(text: str) -> list[str]:
    """The words of a sentence; an elided one (*j'*, *l'*) is a word of its own."""
    return text.replace("'", "' ").split()


def join(words: Sequence[str]) -> str:
    """The sentence of these words."""
    return " ".join(words).replace("' ", "'")


def sentence_pairs(count: int, seed: int) -> list[Pair]:
    """Different English sentences with their translations, the same ones for the same seed."""
    writer = _Writer(Random(seed))
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        english, french = writer.sentence()
        pairs[english] = french
    return list(pairs.items())
