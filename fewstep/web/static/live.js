// The WebSocket client: sequence numbers, pictures as binary frames, reconnecting, asking again when busy.
//
// Tells "open", "offline", "state" {ready}, "waiting" {n, place}, "busy" {message, seconds},
// "failed" {n, code, message}, "refused" (a sentence, of an input) and "painted" {message, blobs, current, sent, request, given}.

import { sentence, tell } from "./dom.js";

const FIRST_WAIT = 250; // ms until it connects again
const LONGEST_WAIT = 4000;
const REMEMBERED = 200; // paints whose request and time of sending are kept for their answer

const inputs = { image: null, mask: null };
const asked = new Map(); // n -> {n, quick, request, sent, answered}
export let n = 0;
let current = null; // the latest of `asked`, unless stopped
let socket = null;
let pending = null; // a painted message whose pictures are still to come
let wait = FIRST_WAIT;
let connecting;
let retrying;

export const isOpen = () => socket?.readyState === WebSocket.OPEN;
export const isBusy = () => current !== null && !current.answered;

const send = (message) => socket.send(JSON.stringify(message));

export function connect() {
  if (socket && socket.readyState <= WebSocket.OPEN) return;
  clearTimeout(connecting);
  const mine = new WebSocket(`${location.origin.replace("http", "ws")}/live`);
  mine.binaryType = "arraybuffer";
  socket = mine;
  pending = null;
  const ifMine = (run) => (event) => {
    if (socket === mine) run(event);
  };
  mine.onopen = ifMine(resume);
  mine.onmessage = ifMine(receive);
  mine.onclose = ifMine(lost);
}

function lost() {
  socket = null;
  clearTimeout(retrying);
  clearTimeout(connecting);
  connecting = setTimeout(connect, wait);
  wait = Math.min(wait * 2, LONGEST_WAIT);
  tell("offline");
}

// The browser's "offline" says nothing of a server on this machine, and a dead socket says nothing at all.
async function probe() {
  try {
    await fetch("/api/config", { cache: "no-store" });
  } catch {
    socket?.close();
    lost();
  }
}

addEventListener("online", connect);
addEventListener("offline", probe);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && n) connect();
});

// A new connection knows nothing of the old one: the pictures first, then the request if it is still open.
function resume() {
  tell("open");
  for (const slot of ["image", "mask"]) if (inputs[slot]) sendInput(slot);
  if (isBusy()) paint(current.request, current.quick, current.given);
}

function sendInput(slot) {
  send({ type: inputs[slot] ? "input" : "clear", slot });
  if (inputs[slot]) socket.send(inputs[slot]);
}

export function setInput(slot, blob) {
  if (inputs[slot] === blob) return;
  inputs[slot] = blob;
  if (isOpen()) sendInput(slot);
}

// `given` are the pictures it is painted from, handed back with the answer.
export function paint(request, quick, given) {
  clearTimeout(retrying);
  n += 1;
  current = { n, quick, request, given, sent: performance.now(), answered: false };
  document.documentElement.dataset.askedN = n;
  asked.set(n, current);
  asked.delete(n - REMEMBERED);
  if (isOpen()) send({ type: "paint", n, quick, request });
}

export function stop() {
  clearTimeout(retrying);
  current = null;
  if (isOpen()) send({ type: "stop" });
}

function receive({ data }) {
  // Only a server that talks counts as back; one that accepts and drops must not be hammered.
  wait = FIRST_WAIT;
  if (typeof data !== "string") {
    receivePicture(data);
    return;
  }
  const message = JSON.parse(data);
  const { type } = message;
  if (type === "painted") pending = { message, blobs: [] };
  else if (type === "state") tell(type, message);
  else if (message.n === current?.n && type === "waiting") tell(type, message);
  else if (type === "failed") failed({ ...message, message: sentence(message.message) });
}

function receivePicture(buffer) {
  if (!pending) return;
  const { message, blobs } = pending;
  blobs.push(new Blob([buffer], { type: "image/webp" }));
  if (blobs.length < message.images.length) return;
  pending = null;
  const one = asked.get(message.n);
  if (!one) return;
  one.answered = true;
  tell("painted", { ...one, message, blobs, current: one === current });
}

function failed(message) {
  // What was superseded is no news; the answer to the newer request is.
  if (message.code === "stopped") return;
  if (message.n == null) tell("refused", message.message);
  if (message.n !== current?.n) return;
  if (message.retry_after == null) {
    current.answered = true;
    tell("failed", message);
    return;
  }
  const { request, quick, given } = current;
  tell("busy", { message: message.message, seconds: message.retry_after });
  clearTimeout(retrying);
  // When the connection is lost meanwhile, `resume` asks again.
  retrying = setTimeout(() => paint(request, quick, given), message.retry_after * 1000);
}
