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
  const canvas = canvasOf(Math.ceil(bitmap.width * scale), Math.ceil(bitmap.height * scale));
  const context = canvas.getContext("2d");
  // Transparent parts count as white, as on the server.
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return { canvas, blob: await encode(canvas, file.type === "image/jpeg") };
}

export async function encode(canvas, photo = false) {
  const png = photo ? null : await toBlob(canvas, "image/png");
  if (png?.size <= MOST_BYTES) return png;
  for (const quality of [0.92, 0.8, 0.6]) {
    const jpeg = await toBlob(canvas, "image/jpeg", quality);
    if (jpeg?.size <= MOST_BYTES) return jpeg;
  }
  throw new Error("This picture is too large to send, even scaled down. Choose another one.");
}

// A file among what was dropped or pasted, or null.
export const pictureIn = ({ files }) => [...files].find(({ type }) => type.startsWith("image/")) ?? null;
