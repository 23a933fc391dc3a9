// Two pictures of the history over one another, with a seam to move: by pointer or by arrow keys.

import { $, el, onClick } from "./dom.js";
import { entries, markSides } from "./history.js";
import { shot as shown } from "./stage.js";
import { toast } from "./status.js";

let pair = []; // A and B, as entries of the history
let next = 0; // the side that the next choice replaces

export const isComparing = () => pair.length > 0;

// Begins with the picture on stage over the one before it.
onClick("compare", () => {
  if (isComparing()) {
    endCompare();
    return;
  }
  const [newest, before] = entries;
  const now = entries.includes(shown) ? shown : newest;
  pair = [now === newest ? before : newest, now];
  next = 0;
  $("wipe-at").value = 50;
  update();
  $("wipe-at").focus();
  if (entries.length > 2) toast("Choose other pictures below to compare them.");
});

export function chooseSide(entry) {
  if (entry === pair[1 - next]) pair.reverse();
  else pair[next] = entry;
  next = 1 - next;
  update();
}

export function endCompare() {
  pair = [];
  update();
}

function update() {
  const active = isComparing();
  pair.forEach(({ urls, request }, i) => {
    const image = el("img", { src: urls[0], alt: `${"AB"[i]}: ${request.prompt}` });
    $(`wipe-${"ab"[i]}`).replaceChildren(image);
  });
  if (active) {
    $("wipe").style.setProperty("--ratio", pair[1].width / pair[1].height);
    $("wipe").style.setProperty("--cap", $("frame").style.getPropertyValue("--cap"));
  }
  $("wipe").hidden = !active;
  $("stage").toggleAttribute("data-compare", active);
  $("compare").setAttribute("aria-pressed", active);
  markSides(pair);
  putSeam();
}

const putSeam = () => $("wipe").style.setProperty("--at", `${$("wipe-at").value}%`);
$("wipe-at").addEventListener("input", putSeam);
