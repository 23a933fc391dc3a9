// The form as a request and back: reading, writing, remembering, the share link. Tells "changed" (commit).
//
// Settings carry the names of a request in the protocol. What comes from outside (storage, a link, a recipe)
// is checked against the server's config before it reaches the form.

import { config } from "./config.js";
import { $, el, fillTrack, onClick, setIcon, store, tell } from "./dom.js";

const AUTO = "auto"; // the shape of the given picture
const RATIO_BOX = 20; // px of a shape's longer side in its icon
const RANGES = { steps: config.steps, guidance: config.guidance, "style-scale": config.style_scale, strength: config.strength };
const DEFAULTS = {
  steps: config.default_steps,
  guidance: config.default_guidance,
  negative_prompt: "",
  num_outputs: 1,
  aspect_ratio: config.sizes[0].name,
  style: null,
  style_scale: 0.8,
  prompt_strength: config.default_strength,
};
const FIELDS = ["prompt", "seed", ...Object.keys(DEFAULTS)];

let hasImage = false;
let locked = false;
let seed;
let shapeBefore = DEFAULTS.aspect_ratio; // the picture came
export const isLocked = () => locked;

const checked = (name) => document.querySelector(`[name="${name}"]:checked`)?.value;

function check(name, value) {
  const found = [...document.getElementsByName(name)].find((input) => input.value === String(value));
  if (found) found.checked = true;
  return found;
}

const negativeCounts = () =>
  config.negative_prompt_above !== null && Number($("guidance").value) > config.negative_prompt_above;

// --- building

function sizeOption({ name, width, height }) {
  const auto = name === AUTO;
  const box = el("i");
  const scale = RATIO_BOX / Math.max(width, height);
  box.style.width = `${Math.round(width * scale)}px`;
  box.style.height = `${Math.round(height * scale)}px`;
  const title = auto ? "The shape of the given picture" : `${name}: ${width} x ${height}`;
  const input = el("input", { type: "radio", name: "size", value: name, ariaLabel: title });
  return el("label", { title, className: auto ? "auto" : "" }, input, box, name);
}

for (const [id, [min, max]] of Object.entries(RANGES)) Object.assign($(id), { min, max });
$("prompt").maxLength = $("negative").maxLength = config.prompt_max;
$("seed").max = config.seed_max;
$("size").append(...[{ name: AUTO, width: 1, height: 1 }, ...config.sizes].map(sizeOption));
for (let value = config.outputs[0]; value <= config.outputs[1]; value += 1) {
  $("number").append(el("label", {}, el("input", { type: "radio", name: "number", value }), value));
}
$("style").append(el("option", { value: "" }, "None"), ...config.styles.map((name) => el("option", {}, name)));
$("style-field").hidden = config.styles.length === 0;
$("improve").hidden = !config.improve;
if (config.negative_prompt_above !== null) {
  const above = config.negative_prompt_above;
  $("guidance-note").textContent = `Off up to ${above}. Above it: closer to the words, at twice the work.`;
}

for (const id of ["prompt", "negative", "style", "seed", "size", "number", ...Object.keys(RANGES)]) {
  for (const type of ["input", "change"]) {
    $(id).addEventListener(type, () => {
      const typed = $("seed").valueAsNumber;
      if (Number.isInteger(typed) && typed >= 0 && typed <= config.seed_max) seed = typed;
      refresh();
      tell("changed", type === "change");
    });
  }
}
$("seed").addEventListener("change", () => putSeed());

// --- reading

// All that is in the form, also what does not count at the moment.
const read = () => ({
  prompt: $("prompt").value,
  steps: Number($("steps").value),
  guidance: Number($("guidance").value),
  seed,
  negative_prompt: $("negative").value,
  num_outputs: Number(checked("number")),
  aspect_ratio: checked("size"),
  style: $("style").value || null,
  style_scale: Number($("style-scale").value),
  prompt_strength: Number($("strength").value),
});

export function readRequest(image, mask) {
  const request = { ...read(), use_image: image, use_mask: image && mask };
  if (!negativeCounts()) request.negative_prompt = "";
  return request;
}

// --- writing

// What is missing or not possible here becomes the default; a prompt and a seed stay as they are.
export function write(settings) {
  const number = (name, [low, high]) => {
    const value = parseFloat(settings[name] ?? DEFAULTS[name]);
    return Math.min(Math.max(Number.isNaN(value) ? DEFAULTS[name] : value, low), high);
  };
  const text = (value) => String(value ?? "").slice(0, config.prompt_max);
  if (settings.prompt) $("prompt").value = text(settings.prompt);
  $("steps").value = number("steps", config.steps);
  $("guidance").value = number("guidance", config.guidance);
  $("style-scale").value = number("style_scale", config.style_scale);
  $("strength").value = number("prompt_strength", config.strength);
  $("negative").value = text(settings.negative_prompt);
  $("style").value = config.styles.includes(settings.style) ? settings.style : "";
  check("number", Math.round(number("num_outputs", config.outputs)));
  const shape = settings.aspect_ratio;
  if ((shape === AUTO && !hasImage) || !check("size", shape)) check("size", DEFAULTS.aspect_ratio);
  const given = parseInt(settings.seed, 10);
  if (given >= 0 && given <= config.seed_max) seed = given;
  putSeed();
  refresh();
}

export function setHasImage(has) {
  if (has === hasImage) return;
  hasImage = has;
  if (has) shapeBefore = checked("size");
  if (has || checked("size") === AUTO) check("size", has ? AUTO : shapeBefore);
  refresh();
}

function refresh() {
  for (const id of Object.keys(RANGES)) {
    const { step, value } = $(id);
    $(`${id}-value`).textContent = Number(value).toFixed(step.split(".")[1]?.length);
    fillTrack($(id));
  }
  $("negative-field").hidden = !negativeCounts();
  $("style-scale-field").hidden = !$("style").value;
  document.querySelector("#size .auto").hidden = !hasImage;
}

// --- the seed

function putSeed() {
  $("seed").value = seed;
  $("seed-note").textContent = locked
    ? "Locked: every picture starts from this seed."
    : "Stays while you type; Paint again draws a new one.";
}

export function drawSeed() {
  seed = Math.floor(Math.random() * (config.seed_max + 1));
  putSeed();
}

export function shuffle() {
  drawSeed();
  tell("changed", true);
}
onClick("seed-shuffle", shuffle);

export function toggleLock() {
  locked = !locked;
  $("seed-lock").ariaPressed = String(locked);
  setIcon($("seed-lock"), locked ? "lock" : "unlock");
  putSeed();
  save();
}
onClick("seed-lock", toggleLock);

// --- remembering and sharing

// Settings outlive the visit; the prompt only the tab, so that a new visit starts at the welcome.
export function save() {
  const { prompt, ...settings } = read();
  store.set("settings", { ...settings, locked });
  store.set("prompt", prompt, "sessionStorage");
}

// Without history of its own the form starts at the defaults. What was typed before the config came counts most.
export function restore() {
  drawSeed();
  const settings = store.get("settings") ?? {};
  write({ ...settings, prompt: $("prompt").value || store.get("prompt", "sessionStorage") });
  if (settings.locked) toggleLock();
}

export function fromLink(fragment) {
  const values = new URLSearchParams(fragment.slice(1));
  if (!values.get("prompt")) return null;
  return Object.fromEntries([...values].filter(([name]) => FIELDS.includes(name)));
}

export function toLink(request, used) {
  const values = { ...request, seed: used };
  const filled = FIELDS.filter((name) => ![null, "", AUTO].includes(values[name]));
  const link = new URL("/", location.href);
  link.hash = new URLSearchParams(filled.map((name) => [name, values[name]]));
  return link.href;
}
