// The REST part of the server: JSON in and out, errors as sentences that can be shown.

import { sentence } from "./dom.js";

const TRIES = 4;
const LONGEST_WAIT = 10; // seconds; a longer Retry-After is the visitor's decision, not the page's

async function once(method, path, body) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  let response;
  try {
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), cache: "no-store" });
  } catch {
    throw new Error("The server cannot be reached. Check the connection and try again.");
  }
  if (response.status === 204) return null;
  const answer = await response.json().catch(() => null);
  if (response.ok && answer) return answer;
  const message = answer?.message ?? `The server answered with an error (${response.status}). Try again in a moment.`;
  const busy = response.status === 429 || response.status === 503;
  throw Object.assign(new Error(sentence(message)), { busy, wait: Number(response.headers.get("Retry-After")) || 1 });
}

// 429 and 503 mean that nothing was done yet, so asking again is safe for every method.
export async function api(method, path, body = null, onBusy = () => {}) {
  for (let tried = 1; ; tried += 1) {
    try {
      return await once(method, path, body);
    } catch (error) {
      if (!error.busy || tried === TRIES || error.wait > LONGEST_WAIT) throw error;
      onBusy(error);
      await new Promise((resolve) => setTimeout(resolve, error.wait * 1000));
    }
  }
}
