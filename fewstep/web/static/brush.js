// A canvas to brush on, for the drawing and for the mask, with its kit of tools. Tells its name with
// whether a stroke is done.

import { $, el, fillTrack, tell } from "./dom.js";

const UNDO_MOST = 12;
const SIZE_AT = 512; // brush sizes are px on a canvas of this longer side
const COLOURS = {
  Black: "#1d1d22",
  Grey: "#8d8d99",
  White: "#ffffff",
  Red: "#d8352f",
  Orange: "#ee8a2d",
  Yellow: "#f3cf45",
  Green: "#3d9a50",
  Sky: "#8cc7ef",
  Blue: "#2f6fd6",
  Lavender: "#9b7fd1",
  Pink: "#ef8fb4",
  Brown: "#7d5638",
};

export class Brush {
  // `paper`: the colour that the eraser leaves, or null where it leaves nothing. `ink`: the only colour, or null.
  constructor(canvas, name, { paper = null, ink = null }) {
    Object.assign(this, { canvas, name, paper, ink, colour: ink ?? COLOURS.Black, erasing: false, past: [] });
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.#buildKit(document.querySelector(`[data-kit=${name}]`));
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const type of ["pointerup", "pointercancel"]) canvas.addEventListener(type, () => this.#up());
  }

  start(width, height, picture) {
    Object.assign(this.canvas, { width, height });
    this.canvas.style.setProperty("--ratio", width / height);
    this.past = [];
    this.#fill("source-over", this.paper);
    if (picture) this.context.drawImage(picture, 0, 0, width, height);
    this.undo.disabled = true;
  }

  #buildKit(kit) {
    kit.append($("kit").content.cloneNode(true));
    const swatches = kit.querySelector(".swatches");
    if (this.ink) swatches.remove();
    else this.#buildSwatches(swatches);
    this.tools = [...kit.querySelectorAll(".tool input")];
    for (const input of this.tools) {
      input.name = `${this.name}-tool`;
      input.addEventListener("change", () => {
        this.erasing = input.value === "eraser";
      });
    }
    const size = kit.querySelector(".thick input");
    if (this.ink) Object.assign(size, { max: 120, value: 48 });
    size.addEventListener("input", () => this.#setSize(size));
    this.#setSize(size);
    const [undo, clear, invert] = kit.querySelectorAll(".do button");
    this.undo = undo;
    undo.addEventListener("click", () => this.#undo());
    clear.addEventListener("click", () => this.#all("source-over", this.paper));
    invert.addEventListener("click", () => this.#all("source-out", this.ink));
    invert.hidden = !this.ink;
  }

  #buildSwatches(swatches) {
    const name = `${this.name}-colour`;
    const use = (colour) => {
      Object.assign(this, { colour, erasing: false });
      this.tools[0].checked = true;
    };
    for (const [title, value] of Object.entries(COLOURS)) {
      const input = el("input", { type: "radio", name, value, ariaLabel: title, checked: value === this.colour });
      input.addEventListener("change", () => use(value));
      const dot = el("i");
      dot.style.background = value;
      swatches.append(el("label", { title }, input, dot));
    }
    const own = el("input", { type: "color", value: "#3aa6a0", ariaLabel: "Another colour", title: "Another colour" });
    own.addEventListener("input", () => {
      for (const radio of document.getElementsByName(name)) radio.checked = false;
      use(own.value);
    });
    swatches.append(own);
  }

  #setSize(range) {
    this.size = Number(range.value);
    fillTrack(range);
  }

  #undo() {
    this.context.putImageData(this.past.pop(), 0, 0);
    this.undo.disabled = this.past.length === 0;
    tell(this.name, true);
  }

  #all(operation, colour) {
    this.#remember();
    this.#fill(operation, colour);
    tell(this.name, true);
  }

  // Without a colour it empties.
  #fill(operation, colour) {
    const { context, canvas } = this;
    context.globalCompositeOperation = colour ? operation : "destination-out";
    context.fillStyle = colour ?? "#000";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.globalCompositeOperation = "source-over";
  }

  #remember() {
    this.past.push(this.context.getImageData(0, 0, this.canvas.width, this.canvas.height));
    if (this.past.length > UNDO_MOST) this.past.shift();
    this.undo.disabled = false;
  }

  #at({ clientX, clientY }) {
    const { left, top, width } = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / width;
    return [(clientX - left) * scale, (clientY - top) * scale];
  }

  #down(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    // A pointer that script made up cannot be captured; it draws all the same.
    if (event.isTrusted) this.canvas.setPointerCapture(event.pointerId);
    this.#remember();
    this.last = this.#at(event);
    this.#line(this.last);
  }

  #move(event) {
    if (!this.last) return;
    this.#line(this.#at(event));
    tell(this.name, false);
  }

  #up() {
    if (this.last) tell(this.name, true);
    this.last = null;
  }

  #line(to) {
    const { context, canvas, erasing, paper } = this;
    context.globalCompositeOperation = erasing && !paper ? "destination-out" : "source-over";
    context.strokeStyle = (erasing && paper) || this.colour;
    context.lineWidth = (this.size * Math.max(canvas.width, canvas.height)) / SIZE_AT;
    context.lineCap = "round";
    context.beginPath();
    context.moveTo(...this.last);
    context.lineTo(...to);
    context.stroke();
    context.globalCompositeOperation = "source-over";
    this.last = to;
  }
}
