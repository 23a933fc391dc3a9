// Which words of the prompt mean nothing to the model, and what to try instead; once typing rests, since half a
// word is unknown too.

import { config } from "./config.js";
import { $, el, on, tell } from "./dom.js";

let resting;

on("painted", ({ message, current }) => {
  if (!current) return;
  clearTimeout(resting);
  resting = setTimeout(show, config.rest_ms, Object.entries(message.unknown_words ?? {}));
});
on("changed", () => clearTimeout(resting));

function show(words) {
  const parts = words.flatMap(([word, instead], i) => {
    const text = `${i ? ", " : ""}${word}`;
    return instead ? [`${text} (try `, button(word, instead), ")"] : [text];
  });
  $("unknown").replaceChildren(...(words.length ? [`The ${config.model} does not know: `, ...parts] : []));
  $("unknown").hidden = !words.length;
}

function button(word, instead) {
  const replace = () => {
    const prompt = $("prompt");
    const whole = new RegExp(`(?<![\\p{L}\\p{N}])${word}(?![\\p{L}\\p{N}])`, "giu");
    prompt.value = prompt.value.replace(whole, instead);
    tell("changed", true);
    prompt.focus();
  };
  return el("button", { type: "button", textContent: instead, onclick: replace });
}
