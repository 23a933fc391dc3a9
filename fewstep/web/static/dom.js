// What all modules share: finding and building elements, the bus that joins them, what the browser remembers.
// Data reaches the page as text only, never as markup.

export const $ = (id) => document.getElementById(id);

export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  Object.assign(element, properties);
  element.append(...children);
  return element;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.append(document.createElementNS(svg.namespaceURI, "use"));
  setIcon(svg, name);
  return svg;
}

export const setIcon = (parent, name) => parent.querySelector("use").setAttribute("href", `#i-${name}`);

// The server's messages are clauses, as for a log.
export const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

const bus = new EventTarget();
export const tell = (type, detail) => bus.dispatchEvent(new CustomEvent(type, { detail }));
export const on = (type, listener) => bus.addEventListener(type, ({ detail }) => listener(detail));

export const onClick = (id, listener) => $(id).addEventListener("click", listener);

// The part of a slider's track before its thumb is coloured; only script knows where that ends.
export function fillTrack(range) {
  const share = (range.value - range.min) / (range.max - range.min || 1);
  range.style.setProperty("--fill", `${share * 100}%`);
}

// Browsers may refuse storage (private windows, policies); the page works without it.
export const store = {
  get(name, area = "localStorage") {
    try {
      return JSON.parse(window[area].getItem(`fewstep.${name}`));
    } catch {
      return null;
    }
  },
  set(name, value, area = "localStorage") {
    try {
      window[area].setItem(`fewstep.${name}`, JSON.stringify(value));
    } catch {
      // Nothing depends on it.
    }
  },
};
