// The window around it all: dialogs, theme, the phone's settings and keyboard. Works before the config is there.

import { $, el, icon, onClick, store } from "./dom.js";

const root = document.documentElement;
const KEYBOARD_BELOW = 560; // px of height that a phone has left when its keyboard is open
const PHONE = matchMedia("(max-width: 700px)");
const DARK = matchMedia("(prefers-color-scheme: dark)");

for (const dialog of document.querySelectorAll("dialog")) {
  const bare = dialog.querySelector("header:not(:has(button))");
  bare?.append(el("button", { className: "close quiet icon", ariaLabel: "Close" }, icon("close")));
  dialog.addEventListener("click", ({ target }) => {
    // A click on the backdrop hits the dialog itself. A drawing is not lost to a stroke that ends outside.
    const outside = target === dialog && !dialog.matches(".easel");
    if (outside || target.closest(".close")) dialog.close("");
  });
}

export function confirmDeletion(title, text) {
  const dialog = $("confirm");
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  dialog.returnValue = "";
  dialog.showModal();
  $("delete-confirm").onclick = () => dialog.close("sure");
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue === "sure");
  });
}

export function switchTheme() {
  const system = DARK.matches ? "dark" : "light";
  const theme = (root.dataset.theme ?? system) === "dark" ? "light" : "dark";
  // Back at the system's theme it follows the system again.
  if (theme === system) delete root.dataset.theme;
  else root.dataset.theme = theme;
  store.set("theme", root.dataset.theme ?? null);
}
onClick("theme", switchTheme);

onClick("settings-toggle", () => {
  const open = $("app").toggleAttribute("data-settings");
  $("settings-toggle").setAttribute("aria-expanded", open);
});

// Some phones lay the keyboard over the page instead of making it smaller: picture and prompt must fit above it.
function fitKeyboard() {
  const { height, scale } = visualViewport;
  if (scale !== 1) return;
  root.style.setProperty("--height", `${height}px`);
  root.toggleAttribute("data-keyboard", PHONE.matches && height < KEYBOARD_BELOW);
}
visualViewport.addEventListener("resize", fitKeyboard);
fitKeyboard();
