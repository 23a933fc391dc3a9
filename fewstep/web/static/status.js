// What the page says about its state: the status line, the notice on the stage, the toast.

import { $, setIcon } from "./dom.js";

// A picture comes several times a second while typing; a screen reader must not read each one out.
const PAINTED_EVERY_MS = 2500;
const TOAST_MS = 5000;

const line = $("status");
const notice = $("notice");
const toastBox = $("toast");

let paintedSaid = 0; // when
let saying;
let counting;
let toasting;

// `often`: may come several times a second.
export function say(state, text, often = false) {
  clearTimeout(saying);
  const wait = paintedSaid + PAINTED_EVERY_MS - performance.now();
  if (often && state === saidState() && wait > 0) {
    saying = setTimeout(say, wait, state, text);
    return;
  }
  if (state === "painted") paintedSaid = performance.now();
  line.dataset.state = state;
  // The same again would be read out again.
  if (line.textContent !== text) line.textContent = text;
}

export const saidState = () => line.dataset.state;

const ICONS = { busy: "clock", waiting: "clock", starting: "clock", offline: "alert", error: "alert", hint: "image" };

// `label` and `run` make a button; `wait` are seconds, counted down in the text's "{s}".
export function showNotice(kind, title, text = "", { label = "", run = null, wait = 0 } = {}) {
  clearInterval(counting);
  notice.hidden = false;
  notice.dataset.kind = kind;
  setIcon(notice, ICONS[kind]);
  notice.querySelector("strong").textContent = title;
  let left = Math.ceil(wait);
  const put = () => {
    notice.querySelector("p").textContent = text.replace("{s}", Math.max(left, 1));
    left -= 1;
  };
  put();
  if (wait) counting = setInterval(put, 1000);
  setButton(notice, label, run);
}

function setButton(parent, label, run) {
  const button = parent.querySelector("button");
  button.hidden = !label;
  button.textContent = label;
  button.onclick = run;
}

// Without kinds, whatever it says.
export function hideNotice(...kinds) {
  if (kinds.length && !kinds.includes(notice.dataset.kind)) return;
  clearInterval(counting);
  notice.hidden = true;
}

export function toast(text, label = "", run = null) {
  clearTimeout(toasting);
  toastBox.firstElementChild.textContent = text;
  setButton(toastBox, label, () => {
    toastBox.hidePopover();
    run();
  });
  // Shown anew each time, so that it lies over a dialog that was opened since.
  toastBox.hidePopover();
  toastBox.showPopover();
  toasting = setTimeout(() => toastBox.hidePopover(), TOAST_MS);
}

export function setBusy(busy) {
  $("stage").toggleAttribute("data-busy", busy);
  $("stop").disabled = !busy;
}

export const seconds = (ms) => `${(ms / 1000).toFixed(2)} s`;
