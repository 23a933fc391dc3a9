// The strip of finished pictures of this visit, shots (see stage.js) with the newest first.
// Tells "chosen" and "dropped" with a shot.

import { $, el, tell } from "./dom.js";

const MOST = 60;
const THUMB = 144; // px; twice the strip's height, for dense screens

const list = $("history");
const buttons = new Map(); // shot -> button
export const entries = [];

export function add(shot) {
  const { request, seed } = shot;
  const button = el("button", { className: "history-item", title: request.prompt }, thumb(shot), el("span"));
  button.ariaLabel = `Bring back: ${request.prompt}, seed ${seed}`;
  button.addEventListener("click", () => tell("chosen", shot));
  entries.unshift(shot);
  buttons.set(shot, button);
  list.prepend(el("li", {}, button));
  list.scrollTo({ left: 0 });
  $("past-empty").hidden = true;
  $("compare").disabled = entries.length < 2;
  if (entries.length > MOST) drop(entries.pop());
  setShown(shot);
}

function drop(shot) {
  buttons.get(shot).parentElement.remove();
  buttons.delete(shot);
  tell("dropped", shot);
}

// Drawn once and small: sixty pictures of full size would be decoded over and over.
function thumb({ urls }) {
  const canvas = el("canvas", { width: THUMB, height: THUMB });
  const image = el("img", { src: urls[0] });
  image.onload = () => {
    const { naturalWidth: width, naturalHeight: height } = image;
    const side = Math.min(width, height);
    canvas.getContext("2d").drawImage(image, (width - side) / 2, (height - side) / 2, side, side, 0, 0, THUMB, THUMB);
  };
  return canvas;
}

export function setShown(shot) {
  for (const [entry, button] of buttons) button.ariaCurrent = String(entry === shot);
}

export function markSides(pair) {
  for (const [entry, button] of buttons) button.lastChild.textContent = "AB"[pair.indexOf(entry)] ?? "";
}

export const focusHistory = () => list.querySelector("button")?.focus();

// Quicker than Tab among sixty.
list.addEventListener("keydown", ({ key, target }) => {
  const item = target.closest("li");
  if (key === "ArrowRight") item?.nextSibling?.firstChild.focus();
  if (key === "ArrowLeft") item?.previousSibling?.firstChild.focus();
});
