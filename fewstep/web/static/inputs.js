// The picture to paint from and its mask: dropped, pasted, picked or drawn; shown, changed and removed.
// Tells "inputs" {silent, commit} and "drawing".

import { Brush } from "./brush.js";
import { config } from "./config.js";
import { $, on, onClick, tell } from "./dom.js";
import { canvasOf, encode, pictureIn, readPicture } from "./pictures.js";
import { toast } from "./status.js";

const DRAWN_SIDE = 768; // px of a drawing's longer side
const STROKE_EVERY_MS = 150; // how often a stroke that is being drawn is sent
const INK = "#5b76ff"; // the mask's colour on screen

// Both pictures are {canvas, blob} or null; the version rises with each change.
export const inputs = { image: null, mask: null, version: 0 };

// `silent`: nothing is asked for it. `commit`: the change is complete, as at a slider's release.
export function setInputs(image, mask, { silent = false, commit = true } = {}) {
  if (image === inputs.image && mask === inputs.mask) return;
  Object.assign(inputs, { image, mask, version: inputs.version + 1 });
  $("image-none").hidden = image !== null;
  $("image-set").hidden = image === null;
  $("mask-remove").hidden = mask === null;
  if (image) {
    showThumb(image.canvas, mask?.canvas);
    $("image-set").scrollIntoView({ block: "nearest" });
  }
  tell("inputs", { silent, commit });
}

onClick("image-remove", () => setInputs(null, null));
onClick("mask-remove", () => setInputs(inputs.image, null));

function showThumb(picture, mask) {
  const thumb = $("image-thumb");
  const context = thumb.getContext("2d");
  const scale = Math.max(thumb.width / picture.width, thumb.height / picture.height);
  const [width, height] = [picture.width * scale, picture.height * scale];
  const at = [(thumb.width - width) / 2, (thumb.height - height) / 2, width, height];
  context.drawImage(picture, ...at);
  context.globalAlpha = 0.6;
  if (mask) context.drawImage(mask, ...at);
  context.globalAlpha = 1;
}

// --- from a file

async function take(file) {
  try {
    setInputs(await readPicture(file), null);
  } catch ({ message }) {
    toast(message);
  }
}

const dialogOpen = () => document.querySelector("dialog[open]") !== null;
const isFile = ({ dataTransfer }) => dataTransfer.types.includes("Files");

$("image-file").addEventListener("change", ({ target }) => {
  if (target.files[0]) take(target.files[0]);
  // So that the same file can be chosen again.
  target.value = "";
});

document.addEventListener("paste", (event) => {
  const picture = pictureIn(event.clipboardData);
  if (!picture || dialogOpen()) return;
  event.preventDefault();
  take(picture);
});

document.addEventListener("dragover", (event) => {
  if (!isFile(event)) return;
  event.preventDefault();
  $("drop").hidden = dialogOpen();
});

document.addEventListener("dragleave", ({ relatedTarget }) => {
  if (!relatedTarget) $("drop").hidden = true;
});

document.addEventListener("drop", (event) => {
  $("drop").hidden = true;
  if (!isFile(event)) return;
  // Also where it is not taken: a browser would leave the page for the file.
  event.preventDefault();
  if (dialogOpen()) return;
  const picture = pictureIn(event.dataTransfer);
  if (picture) take(picture);
  else toast("Only pictures can be dropped here: JPEG, PNG or WebP files.");
});

// --- drawn

const easel = new Brush($("draw-canvas"), "draw", { paper: "#ffffff" });
let before = [null, null]; // what Cancel brings back
let turn = 0; // encoding takes a while: only the latest counts, and none after Cancel
let sending = false;
let lastSent = 0;

async function sendDrawing(commit) {
  turn += 1;
  const mine = turn;
  const canvas = canvasOf(easel.canvas.width, easel.canvas.height);
  canvas.getContext("2d").drawImage(easel.canvas, 0, 0);
  const blob = await encode(canvas);
  if (mine === turn) setInputs({ canvas, blob }, null, { commit });
}

function openEasel() {
  before = [inputs.image, inputs.mask];
  const shape = document.querySelector("[name=size]:checked").value;
  const picture = inputs.image?.canvas;
  const { width, height } = picture ?? config.sizes.find(({ name }) => name === shape);
  const scale = DRAWN_SIDE / Math.max(width, height);
  easel.start(Math.round(width * scale), Math.round(height * scale), picture);
  $("draw-dialog").returnValue = "";
  $("draw-dialog").showModal();
  tell("drawing");
}
onClick("draw", openEasel);
onClick("draw-over", openEasel);

on("draw", async (done) => {
  const soon = sending || performance.now() - lastSent < STROKE_EVERY_MS;
  if (!config.live || (soon && !done)) return;
  lastSent = performance.now();
  sending = true;
  await sendDrawing(false);
  sending = false;
});

onClick("draw-done", async () => {
  await sendDrawing(true);
  $("draw-dialog").close("done");
});

$("draw-dialog").addEventListener("close", ({ target }) => {
  if (target.returnValue === "done") return;
  turn += 1;
  setInputs(...before);
});

// --- the mask

const cover = new Brush($("mask-canvas"), "mask", { ink: INK });

onClick("mask-edit", () => {
  const { canvas } = inputs.image;
  const { width, height } = canvas;
  const under = $("mask-image");
  Object.assign(under, { width, height });
  under.style.setProperty("--ratio", width / height);
  under.getContext("2d").drawImage(canvas, 0, 0);
  cover.start(width, height, inputs.mask?.canvas);
  $("mask-dialog").showModal();
});

onClick("mask-done", async () => {
  const mask = await readMask();
  $("mask-dialog").close();
  setInputs(inputs.image, mask);
});

// On screen a tint over the picture, to the server white on black without half tones.
async function readMask() {
  const { width, height } = cover.canvas;
  const pixels = cover.context.getImageData(0, 0, width, height);
  let any = false;
  for (let i = 0; i < pixels.data.length; i += 4) {
    const on = pixels.data[i + 3] > 127;
    any ||= on;
    pixels.data.fill(on ? 255 : 0, i, i + 3);
    pixels.data[i + 3] = 255;
  }
  if (!any) return null;
  const sent = canvasOf(width, height);
  sent.getContext("2d").putImageData(pixels, 0, 0);
  const canvas = canvasOf(width, height);
  canvas.getContext("2d").drawImage(cover.canvas, 0, 0);
  return { canvas, blob: await encode(sent) };
}
