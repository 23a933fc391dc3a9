"""scripts/predict --recipe IMAGE: generate an image again from its own metadata."""

import base64
import hashlib
import io
from typing import Any

from fewstep.cli.run import say
from fewstep.errors import FewstepError, Refused
from fewstep.images.metadata import Recipe, inputs_of, read_recipe

__all__ = ["follow", "read_recipe", "say_what_changed"]

Inputs = dict[str, Any]


def follow(recipe: Recipe, given: Inputs, environ: dict[str, str]) -> Inputs:
    """Return the recipe's inputs, overridden by `given`; Refused when it cannot be followed."""
    model = environ["FEWSTEP_MODEL"] = environ.get("FEWSTEP_MODEL") or recipe["model"]
    if model != recipe["model"]:
        raise Refused(f"the picture was painted by {recipe['model']}; set FEWSTEP_MODEL to that, or unset it")
    for name in ("image", "mask"):
        wanted = recipe.get(f"{name}_sha256")
        if wanted and wanted != _sha256_of_url(given.get(name, "")):
            raise Refused(
                f"it was painted from another file as {name}; give that very one, as -i {name}=@FILE"
            )
    inputs = inputs_of(recipe)
    if given.get("aspect_ratio", "custom") != "custom":
        del inputs["width"], inputs["height"]
    return inputs | given


def _sha256_of_url(url: object) -> str:
    try:
        return hashlib.sha256(base64.b64decode(str(url).partition(";base64,")[2], validate=True)).hexdigest()
    except ValueError:  # no base64
        return ""


def say_what_changed(recipe: Recipe, content: bytes) -> None:
    """Say whether the weights or styles in the metadata of `content` are others than the recipe's."""
    try:
        now = read_recipe(io.BytesIO(content))
    except FewstepError:  # the server keeps no recipes
        return
    if now["revision"] != recipe["revision"]:
        say("the weights are others than the picture was painted by")
    if [style["sha256"] for style in now["styles"]] != [style["sha256"] for style in recipe["styles"]]:
        say("the styles are others than the picture was painted with")
