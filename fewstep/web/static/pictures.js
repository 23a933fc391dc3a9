// A visitor's own picture: reading it from a file, scaling it down, encoding it within the server's limits.

const LONGEST_SIDE = 1024;
const MOST_BYTES = 4 * 1024 * 1024;

export function canvasOf(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

const toBlob = (canvas, type, quality) => new Promise((resolve) => canvas.toBlob(resolve, type, quality));

// Always encoded anew, also when it is small enough: a photo's file may tell where it was taken.
export async function readPicture(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    throw new Error("This file is not a picture that the browser can read. Choose a JPEG, PNG or WebP file.");
  }
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = canvasOf(Math.round(bitmap.width * scale) || 1, Math.round(bitmap.height * scale) || 1);
  const context = canvas.getContext("2d");
  // Transparent parts count as white, as on the server.
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return { canvas, blob: await encode(canvas, file.type === "image/jpeg") };
}

// At this size a JPEG always fits.
export async function encode(canvas, photo = false) {
  const png = photo ? null : await toBlob(canvas, "image/png");
  return png?.size <= MOST_BYTES ? png : toBlob(canvas, "image/jpeg", 0.92);
}

// A file among what was dropped or pasted, or null.
export const pictureIn = ({ files }) => [...files].find(({ type }) => type.startsWith("image/")) ?? null;
