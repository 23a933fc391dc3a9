"""The miniature at a quarter of its size, for tests in which size does not matter, and drawings of its
world."""

from dataclasses import replace

from PIL import Image

from fewstep.miniature.judge import PLACE_COUNT, load_judge
from fewstep.miniature.world.drawing import draw
from fewstep.miniature.world.scenes import NOTHING, Placed, Scene
from fewstep.miniature.world.things import OWN, THINGS
from fewstep.miniature.world.words import ATTRIBUTES, COLOURS
from fewstep.models.specs import get_model
from fewstep.settings import Settings

MINIATURE = replace(get_model("miniature"), native_size=128)


def drawn(thing: str = "castle", seed: int = 1, side: int = 128, colour: str = OWN) -> Image.Image:
    """A drawing that no model generated."""
    return draw(Scene((Placed(thing, colour),), "snow", "hills", "day", "middle"), seed, side, side)


def read(image: Image.Image) -> set[str]:
    """What the judge sees in it: things and their colours, ground, backdrop and sky."""
    judge = load_judge(Settings().weights_root / "miniature")
    [row] = judge.look([image.convert("RGB")]).labels
    things = {list(THINGS)[label - 1] for label in row[:PLACE_COUNT] if label != NOTHING}
    colours = {(OWN, *COLOURS)[label - 1] for label in row[PLACE_COUNT : 2 * PLACE_COUNT] if label != NOTHING}
    rest = zip(("ground", "backdrop", "sky"), row[2 * PLACE_COUNT :], strict=True)
    return things | colours | {ATTRIBUTES[name][label] for name, label in rest}
