// What this server can do. Every module that imports it waits here until the server has answered.

import { api } from "./api.js";
import { hideNotice, say, showNotice } from "./status.js";

async function load() {
  for (let wait = 0.5; ; wait = Math.min(wait * 2, 4)) {
    try {
      const config = await api("GET", "/api/config");
      hideNotice();
      return config;
    } catch ({ message }) {
      say("offline", "No connection");
      showNotice("offline", "The server does not answer", `${message} Trying again.`);
      await new Promise((resolve) => setTimeout(resolve, wait * 1000));
    }
  }
}

export const config = await load();
