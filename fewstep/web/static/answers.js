// What the page does with each answer of the server.

import { answered, failed, paintNow } from "./asking.js";
import { $, el, on } from "./dom.js";
import { add, entries, setShown } from "./history.js";
import * as live from "./live.js";
import * as stage from "./stage.js";
import { hideNotice, say, saidState, seconds, showNotice, toast } from "./status.js";

let wasReady = false;

on("painted", async ({ message, blobs, current, sent, request, given }) => {
  const urls = blobs.map((blob) => URL.createObjectURL(blob));
  const shot = { ...message, blobs, urls, sent, request, given };
  if (current) answered();
  const became = await stage.show(shot);
  if (became === "broken") toast("A picture arrived damaged. Paint again.");
  if (became !== "shown") release(shot);
  else if (shot.quick) setShown(null);
  else add(shot);
});

function release(shot) {
  if (shot !== stage.shot && !entries.includes(shot)) shot.urls.forEach((url) => URL.revokeObjectURL(url));
}
on("replaced", release);
on("dropped", release);

on("shown", ({ quick, shown, sent }) => {
  if (live.isOpen() && saidState() !== "starting") say("painted", `Painted in ${seconds(shown - sent)}`, quick);
  hideNotice("error", "busy", "waiting", "hint");
  tellTimes();
});
on("selected", tellTimes);

function tellTimes() {
  const { shown, sent, paint_ms, width, height } = stage.shot;
  const times = [seconds(shown - sent), `painted in ${seconds(paint_ms)}`];
  const parts = [...times, `seed ${stage.seed()}`, `${width} x ${height}`];
  $("timing").replaceChildren(...parts.map((part) => el("span", {}, part)));
}

on("waiting", ({ place }) => {
  if (saidState() === "starting") return;
  const text = place > 0 ? `${place} before you` : "You are next";
  say("waiting", text);
  if (place > 0) showNotice("waiting", text, "Your picture is painted as soon as it is your turn.");
  else hideNotice("waiting");
});

on("busy", ({ message, seconds: wait }) => {
  say("waiting", `${message} Trying again.`);
  showNotice("busy", message, "Trying again in {s} s.", { wait });
});

on("failed", ({ code, message }) => {
  failed();
  say("error", message);
  if (code === "invalid_request") showNotice("error", message, "Change the settings and paint again.");
  else showNotice("error", message, "", { label: "Try again", run: paintNow });
});

on("refused", toast);

on("state", ({ ready }) => {
  if (ready) {
    wasReady = true;
    hideNotice("starting");
    if (["starting", "offline", "idle"].includes(saidState())) say("idle", live.isBusy() ? "Painting" : "Ready");
    return;
  }
  const text = `One moment, the model is ${wasReady ? "restarting" : "starting"}`;
  say("starting", text);
  showNotice("starting", text, "What you asked for is kept and painted as soon as it is back.");
});

on("open", () => {
  hideNotice("offline");
  if (saidState() === "offline") say("idle", "Connected");
});

on("offline", () => {
  say("offline", "Connection lost. Reconnecting");
  showNotice("offline", "Connection lost", `${stage.shot ? "Your picture stays. " : ""}Reconnecting.`);
});
