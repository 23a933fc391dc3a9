// What is asked of the server and when: at once and small with each change, at full size when the change rests.

import { endCompare, isComparing } from "./compare.js";
import { config } from "./config.js";
import * as controls from "./controls.js";
import { $, on, onClick } from "./dom.js";
import { inputs } from "./inputs.js";
import * as live from "./live.js";
import * as stage from "./stage.js";
import { hideNotice, say, saidState, setBusy, showNotice } from "./status.js";

const SLOW_MS = 1000; // what takes longer is announced

let full = null; // the request that was last asked at full size, unless another followed
let resting;
let slow;

const request = () => controls.readRequest(inputs.image !== null, inputs.mask !== null);
const key = () => `${JSON.stringify(request())} ${inputs.version}`;
export const isBlank = () => $("prompt").value.trim() === "";

const label = () => {
  $("paint").firstElementChild.textContent = full && key() === full ? "Paint again" : "Paint";
};

export function ask(quick) {
  clearTimeout(resting);
  clearTimeout(slow);
  if (isComparing()) endCompare();
  full = quick ? null : key();
  live.paint(request(), quick, { ...inputs });
  setBusy(true);
  slow = setTimeout(() => {
    if (live.isBusy() && ["idle", "painted", "error"].includes(saidState())) say("painting", "Painting");
  }, SLOW_MS);
  label();
}

// `commit`: the change is complete, as at a slider's release.
export function changed(commit) {
  clearTimeout(resting);
  controls.save();
  // The address tells the truth only until something is changed.
  if (location.hash) history.replaceState(null, "", location.pathname + location.search);
  label();
  if (isBlank()) {
    if (live.isBusy() || !$("stage").hasAttribute("data-dim")) clear();
  } else if (config.live && (commit || !config.quick)) {
    if (key() !== full) ask(false);
  } else if (config.live) {
    ask(true);
    resting = setTimeout(ask, config.rest_ms, false);
  }
}
on("changed", changed);

on("inputs", ({ silent, commit }) => {
  live.setInput("image", inputs.image?.blob ?? null);
  live.setInput("mask", inputs.mask?.blob ?? null);
  controls.setHasImage(inputs.image !== null);
  if (!silent) changed(commit);
});

// Asked again for what is painted already, the visitor wants another picture; while it is under way, that one.
export function paintNow() {
  if (isBlank()) {
    $("prompt").focus();
    return;
  }
  const same = key() === full;
  if (same && live.isBusy()) return;
  if (same && !controls.isLocked()) controls.drawSeed();
  ask(false);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  paintNow();
});

export function answered() {
  clearTimeout(slow);
  setBusy(false);
}

export function failed() {
  answered();
  full = null;
  label();
}

export function halt() {
  clearTimeout(resting);
  live.stop();
  stage.ignoreUpTo(live.n);
  failed();
}

// The form now says what is on stage, so that the next Enter asks for another picture.
export function settled() {
  controls.save();
  full = key();
  label();
}

function clear() {
  halt();
  endCompare();
  hideNotice("error", "busy", "waiting");
  if (stage.shot) {
    stage.dim(true);
    showNotice("hint", "What should it be?", "Describe a picture, and it appears as you type.");
  }
  if (live.isOpen()) say("idle", "Ready");
}

export function stop() {
  if (isComparing()) endCompare();
  else if (live.isBusy()) {
    halt();
    hideNotice("busy", "waiting");
    say("idle", "Stopped");
  } else document.activeElement.blur();
}
onClick("stop", stop);
