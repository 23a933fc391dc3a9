// The start: joins the parts, offers the examples, opens a link or what was left from before.

import "./shell.js";
import "./actions.js";
import "./answers.js";
import "./keys.js";
import "./unknown.js";
import { api } from "./api.js";
import { ask, changed, halt, isBlank } from "./asking.js";
import { config } from "./config.js";
import { fromLink, restore, write } from "./controls.js";
import { $, el, onClick } from "./dom.js";
import { setInputs } from "./inputs.js";
import { connect } from "./live.js";
import { toast } from "./status.js";

function usePrompt(prompt) {
  $("prompt").value = prompt;
  changed(true);
}

for (const example of config.examples) {
  const button = el("button", {}, example);
  button.addEventListener("click", () => {
    $("prompt").focus({ preventScroll: true });
    usePrompt(example);
  });
  $("examples").append(el("li", {}, button));
}

onClick("improve", async () => {
  const before = $("prompt").value;
  if (isBlank()) return;
  $("improve").disabled = true;
  try {
    usePrompt((await api("POST", "/api/improve", { prompt: before })).prompt);
    toast("Your prompt was improved.", "Undo", () => usePrompt(before));
  } catch ({ message }) {
    toast(message);
  }
  $("improve").disabled = false;
});

function openLink() {
  const settings = fromLink(location.hash);
  if (!settings) return false;
  halt();
  setInputs(null, null, { silent: true });
  write(settings);
  // A link must not spend the visitor's money.
  if (config.live) ask(false);
  return true;
}

$("model").textContent = config.model;
$("draw-live").hidden = !config.live;
restore();
connect();
addEventListener("hashchange", openLink);
if (!openLink() && !isBlank()) changed(true);
document.documentElement.dataset.ready = "";
