"""The words of the world: common English words of three to six letters, and which of them are held out.

A combination is the letters of a word in any order, so words of the same letters (`diaper`, `paired`) are on one side.
About a quarter of the words is held out. Each pair of neighbouring letters of a held-out word, its first and its last
letter are in a training word: a model can write a held-out word with what it has learned, and has never seen it.
"""

import hashlib
from collections import Counter
from functools import cache

SPLITS = ("train", "held_out")
HELD_OUT_FRACTION = 0.25
_SALT = 1

WORDS = tuple(
    """
    ant ape arm art ash axe bag ball band bank barn base bat bath bay beach bead beam bean bear beard bed bee beef
    bell belt bench berry bird blade blue boat body bolt bone book boot bottle bowl box boy brain branch brass bread
    brick bridge broom brown brush bucket bud bug bull bus bush butter button cab cabin cable cage cake calm camel
    camera camp candle cane canoe cap cape car card carpet carrot cart castle cat cave cedar cell chain chair chalk
    cheese cherry chess chest chief child church circle city clay cliff cloak clock cloth cloud clover coal coast
    coat cobra coffee coin comb copper coral cord cork corn cotton couch cow crab crane cream creek crow crown cube
    cup curl curve dance dart dawn deck deer desert desk dew dice dirt dish dog doll donkey door dove dragon drawer
    dream dress drink drum duck dust eagle ear earth east edge egg elbow engine eye fabric face fair fan farm feast
    fence fern ferry field fig film finger fire fish flag flame flask flint flock floor flour flower flute fly foam
    fog forest fork fox frame frog frost fruit fur garage garden garlic gate gem giant ginger glass globe glove glue
    goat gold golf goose grape grass green guitar gull hair hall hammer hand harbor harp hat hawk hay heart hedge
    helmet hen herb hero hill hive home honey hood hoof hook horn horse hotel house ice ink iris iron island ivory
    ivy jacket jam jar jaw jelly jewel joke judge juice jungle kettle key king kite kitten knee knife knot label
    lace ladder lake lamb lamp land lark lava lawn lead leaf leg lemon letter light lily lime line lion lip lizard
    lock log lunch magnet mango map maple marble mask mast mat meadow meal melon metal milk mill mint mirror mole
    monkey moon moss moth mouse mouth mud mule museum music nail neck needle nest net north nose note nurse nut oak
    oar oasis ocean office oil olive onion orange orchid otter oven owl oyster paint palm pan panda paper parade
    park parrot path paw pea peach pear pearl pebble pen pencil pepper phone piano pie pig pillow pilot pine pink
    pipe pirate planet plant plate plum pocket poem pond pony port pot potato powder prince print prism puddle pump
    puppy purple queen quilt quiz rabbit radio raft rail rain ranch raven ribbon rice ring river road robe robin
    robot rock roof room root rope rose ruby rug ruler saddle safe sail salad salt sand scale scarf school seal seat
    seed shade shark shed sheep shelf shell ship shirt shoe shop shore shovel silk silver sink skirt sky sleep slope
    smile smoke snail snake snow soap sock soda sofa soil song soup south spark spice spider spoon spring square
    stable stair stamp star steam steel stem stone storm stove straw stream street string sugar suit summer sun swan
    sword syrup table tail tank tape tea temple tent thread throne tie tiger tile toast toe tomato tool tooth torch
    towel tower town toy track trail train tray tree truck trunk tube tulip tunnel turtle twig valley van vase vest
    villa vine violet violin voice wagon wall walnut water wave wax web whale wheat wheel wind window wine wing
    winter wire wolf wood wool yacht yard year yellow yogurt zebra zero zipper zoo
    """.split()
)


def combination(word: str) -> str:
    """The letters of a word, in the order of the alphabet."""
    return "".join(sorted(word))


def parts(word: str) -> tuple[str, ...]:
    """Its pairs of neighbouring letters, with `^` before the first letter and `$` behind the last one."""
    marked = f"^{word}$"
    return tuple(marked[place : place + 2] for place in range(len(marked) - 1))


@cache
def words(split: str) -> tuple[str, ...]:
    """The words of "train" or "held_out", in the order of the alphabet. The split depends on nothing but the words.

    Raises ValueError for another split.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    combinations: dict[str, list[str]] = {}
    for word in WORDS:
        combinations.setdefault(combination(word), []).append(word)
    left = Counter(part for word in WORDS for part in parts(word))
    held_out, wanted = set[str](), round(HELD_OUT_FRACTION * len(WORDS))
    for letters in sorted(combinations, key=_rank):
        own = Counter(part for word in combinations[letters] for part in parts(word))
        if len(held_out) < wanted and all(left[part] > count for part, count in own.items()):
            held_out.update(combinations[letters])
            left -= own
    return tuple(word for word in WORDS if (word in held_out) == (split == "held_out"))


def _rank(letters: str) -> str:
    return hashlib.sha256(f"{_SALT} {letters}".encode()).hexdigest()
