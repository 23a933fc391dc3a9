// Keyboard shortcuts and the dialog that lists them.

import { paintNow, stop } from "./asking.js";
import { shuffle, toggleLock } from "./controls.js";
import { $, el, onClick, store } from "./dom.js";
import { focusHistory } from "./history.js";
import { switchTheme } from "./shell.js";

const press = (id) => () => $(id).click();
const LIST = [
  ["Enter", "Paint now, at full size"],
  ["Shift Enter", "New line in the prompt"],
  ["Esc", "Stop; end comparing; leave the prompt"],
  ["/", "To the prompt", () => $("prompt").focus()],
  ["L", "Lock or unlock the seed", toggleLock],
  ["S", "Shuffle: a new seed", shuffle],
  ["D", "Download the picture", press("download")],
  ["K", "Keep it in the gallery", press("keep")],
  ["C", "Compare two pictures", press("compare")],
  ["H", "To the history, then arrow keys", focusHistory],
  ["G", "Open the gallery", press("gallery-open")],
  ["T", "Switch between light and dark", switchTheme],
  ["?", "This list", press("shortcuts-open")],
];
const TEXT_FIELD = "textarea, select, [type=text], [type=number]";
const OWN_ENTER = "button, a, select, [type=file], [type=color]";

document.addEventListener("keydown", (event) => {
  const { key, target } = event;
  // While an input method composes, Enter and Esc belong to it; in a dialog they belong to the dialog.
  if (event.isComposing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (document.querySelector("dialog[open]")) return;
  if (key === "Escape") {
    stop();
  } else if (key === "Enter") {
    if (event.shiftKey || target.closest(OWN_ENTER)) return;
    event.preventDefault();
    paintNow();
  } else if (!target.matches(TEXT_FIELD)) {
    const run = LIST.find(([name]) => name === key.toUpperCase())?.[2];
    if (!run || event.repeat || !$("letters").checked) return;
    event.preventDefault();
    run();
  }
});

for (const [keys, what] of LIST) {
  const names = keys.split(" ").map((key) => el("kbd", {}, key));
  $("keys").append(el("div", {}, el("dt", {}, ...names), el("dd", {}, what)));
}
onClick("shortcuts-open", () => $("shortcuts").showModal());

// Speech input types words: who uses it must be able to switch single letters off (WCAG 2.1.4).
$("letters").checked = store.get("letters") ?? true;
$("letters").addEventListener("change", ({ target }) => store.set("letters", target.checked));
