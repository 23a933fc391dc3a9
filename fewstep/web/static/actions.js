// What can be done with a finished picture: download, share, keep, bring back; and taking a recipe.

import { changed, halt, settled } from "./asking.js";
import { keep, openGallery } from "./community.js";
import { chooseSide, isComparing } from "./compare.js";
import { config } from "./config.js";
import * as controls from "./controls.js";
import { $, el, on, onClick } from "./dom.js";
import { setShown } from "./history.js";
import { setInputs } from "./inputs.js";
import * as stage from "./stage.js";
import { hideNotice, toast } from "./status.js";

const kept = new Set(); // ids of pictures in the gallery

function offer() {
  if (!stage.shot) return;
  const url = stage.url();
  Object.assign($("download"), { href: url, download: `fewstep-${stage.seed()}.webp`, ariaDisabled: null });
  $("share").disabled = false;
  $("keep").disabled = kept.has(stage.pictureId());
  $("keep").lastElementChild.textContent = $("keep").disabled ? "Kept" : "Keep";
  if ($("draw-dialog").open) $("draw-live").replaceChildren(el("img", { src: url, alt: "Painted from your drawing" }));
}
on("shown", offer);
on("selected", offer);
on("drawing", offer);

onClick("share", async () => {
  const { request, seed } = stage.shot;
  const link = controls.toLink(request, seed);
  const without = request.use_image ? " It does not carry your own picture." : "";
  try {
    await navigator.clipboard.writeText(link);
    toast(`Link copied: it opens these settings and paints.${without}`);
  } catch {
    // Without https or permission there is no clipboard.
    history.replaceState(null, "", link);
    toast(`The link is in the address bar. Copy it from there.${without}`);
  }
});

onClick("keep", async () => {
  const id = stage.pictureId();
  $("keep").disabled = true;
  try {
    await keep(id);
    kept.add(id);
    toast("Kept in the gallery.", "Open gallery", openGallery);
  } catch ({ message }) {
    toast(message);
  }
  offer();
});

on("chosen", (shot) => {
  if (isComparing()) {
    chooseSide(shot);
    return;
  }
  const { request, given, seed } = shot;
  halt();
  setInputs(given.image, given.mask, { silent: true });
  controls.write({ ...request, seed });
  setShown(shot);
  hideNotice("error", "busy", "waiting", "hint");
  settled();
  stage.show(shot, true);
});

on("recipe", (recipe) => {
  halt();
  setInputs(null, null, { silent: true });
  controls.write(recipe);
  changed(true);
  if (!config.live) toast("The settings are in the form. Press Paint to paint them.");
});
