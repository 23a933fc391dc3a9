// The stage: shows pictures without a flash, alone or as a grid, and records when each one was seen.
//
// A shot is what one paint gave: {n, quick, request, seed, width, height, paint_ms, sent, images, blobs, urls}.
// Tells "shown" and "replaced" with a shot, and "selected".

import { config } from "./config.js";
import { $, el, onClick, tell } from "./dom.js";

const ENLARGED = 5; // how much larger than its native size a picture is shown at most
const SAME_RATIO = 0.04; // quick and full sizes are rounded to multiples of 8 px each
const TIMES_MAX = 2000;

const frame = $("frame");
export let shot = null;
let selected = 0; // of several pictures
let alone = false; // whether that one is seen large
let ratio = 0;
let shownN = 0;
let floor = 0; // answers up to this number are not wanted any more
let turn = 0;
window.fewstepTimes = [];

export const seed = () => (shot.seed + selected) % (config.seed_max + 1);
export const url = () => shot.urls[selected];
export const pictureId = () => shot.images[selected];

async function decoded(src, alt) {
  const image = el("img", { src, alt });
  await image.decode();
  return image;
}

// Answers what became of it: "shown", "late" or "broken". `restored`: chosen by the visitor, so never late.
export async function show(next, restored = false) {
  if (restored) turn += 1;
  const mine = turn;
  let images;
  try {
    images = await Promise.all(next.urls.map((src) => decoded(src, next.request.prompt)));
  } catch {
    return "broken";
  }
  if (restored ? mine !== turn : next.n < shownN || next.n <= floor) return "late";
  shownN = Math.max(shownN, next.n);
  const before = shot;
  shot = next;
  if (restored || before?.urls.length !== images.length) {
    selected = 0;
    alone = false;
  }
  swap(images);
  requestAnimationFrame(() => record(next, restored));
  if (before && before !== next) tell("replaced", before);
  return "shown";
}

function swap(images) {
  // A size's own ratio, not that of the file: the box must not move between the quick and the full picture.
  const size = config.sizes.find(({ name }) => name === shot.request.aspect_ratio);
  const { width, height } = size ?? shot;
  if (size || Math.abs(width / height / ratio - 1) > SAME_RATIO) ratio = width / height;
  const count = images.length;
  // Where the number stays, only the images change, so that a focused picture keeps its focus.
  if (frame.childElementCount !== count) frame.replaceChildren(...images.map((_, i) => cell(i, count)));
  images.forEach((image, i) => frame.children[i].replaceChildren(image));
  layout();
  frame.hidden = false;
  $("stage").removeAttribute("data-empty");
  dim(false);
}

function cell(i, count) {
  if (count === 1) return el("div", { className: "cell" });
  const button = el("button", { className: "cell" });
  button.addEventListener("click", () => select(i, !alone));
  return button;
}

function select(i, large) {
  selected = i;
  alone = large;
  layout();
  tell("selected");
}

function layout() {
  const count = frame.childElementCount;
  const one = count === 1 || alone;
  const columns = one || (count === 2 && ratio > 1.2) ? 1 : 2;
  const rows = one ? 1 : Math.ceil(count / columns);
  const shape = (ratio * columns) / rows;
  const longest = config.native_size * ENLARGED * Math.max(columns, rows);
  frame.style.setProperty("--ratio", shape);
  frame.style.setProperty("--columns", columns);
  frame.style.setProperty("--cap", `${Math.min(1, shape) * longest}px`);
  [...frame.children].forEach((one, i) => {
    one.hidden = alone && i !== selected;
    one.firstChild.id = i === selected ? "picture" : "";
    if (count > 1) one.ariaLabel = `Picture ${i + 1} of ${count}. ${alone ? "Show all" : "Show it alone"}`;
  });
  $("show-all").hidden = !alone;
  $("show-all").lastChild.textContent = `All ${count}`;
}

onClick("show-all", () => {
  select(selected, false);
  frame.children[selected].focus();
});

// After the swap, before the browser paints the frame that shows it: what tests and measurements read.
function record(seen, restored) {
  const shown = performance.now();
  const { n, sent, paint_ms, quick, request } = seen;
  Object.assign(document.documentElement.dataset, { shownN: n, shownPrompt: request.prompt, shownQuick: quick });
  if (!restored) {
    seen.shown = shown;
    performance.mark(`shown-${n}`);
    performance.clearMarks(`shown-${n - TIMES_MAX}`);
    window.fewstepTimes.push({ n, sent, shown, paint_ms });
    if (window.fewstepTimes.length > TIMES_MAX) window.fewstepTimes.shift();
  }
  tell("shown", seen);
}

export const dim = (dimmed) => $("stage").toggleAttribute("data-dim", dimmed);

// Whatever is still on its way was for a request that is gone.
export const ignoreUpTo = (n) => {
  floor = n;
};
