// Reading a picture as the model was trained to see it: Pillow's resizing, exactly.
"use strict";

const BITS = 22; // of Pillow's fixed-point weights
const FILTERS = {
  box: { support: 0.5, at: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0) },
  bicubic: {
    support: 2,
    at(x) {
      x = Math.abs(x);
      if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
      return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
    },
  },
};

/** Return, for each of `to` cells, the first of `from` cells that it reads and their weights. */
function weightsOf(from, to, filter) {
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  const support = filter.support * stretch;
  return Array.from({ length: to }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(center - support + 0.5), 0);
    const end = Math.min(Math.trunc(center + support + 0.5), from);
    const row = [];
    for (let x = first; x < end; x++) row.push(filter.at((x - center + 0.5) * (1 / stretch)));
    const sum = row.reduce((a, b) => a + b, 0);
    const fixed = row.map((w) => Math.trunc((w / sum) * 2 ** BITS + (w / sum < 0 ? -0.5 : 0.5)));
    return { first, fixed };
  });
}

/** Resize one axis: `lines` runs of `from` cells, cells `step` apart and lines `jump` apart. */
function resizeAxis(pixels, width, height, size, filter, across) {
  const [from, lines] = across ? [width, height] : [height, width];
  const outWidth = across ? size : width;
  const made = new Uint8ClampedArray(3 * outWidth * (across ? height : size));
  const rows = weightsOf(from, size, filter);
  for (let line = 0; line < lines; line++) {
    for (let i = 0; i < size; i++) {
      const { first, fixed } = rows[i];
      const target = 3 * (across ? line * outWidth + i : i * outWidth + line);
      for (let channel = 0; channel < 3; channel++) {
        let sum = 1 << (BITS - 1);
        for (let k = 0; k < fixed.length; k++) {
          const place = across ? line * width + first + k : (first + k) * width + line;
          sum += pixels[3 * place + channel] * fixed[k];
        }
        made[target + channel] = sum >> BITS;
      }
    }
  }
  return made;
}

function resize({ pixels, width, height }, toWidth, toHeight, filter) {
  if (toWidth !== width) pixels = resizeAxis(pixels, width, height, toWidth, filter, true);
  if (toHeight !== height) pixels = resizeAxis(pixels, toWidth, height, toHeight, filter, false);
  return { pixels, width: toWidth, height: toHeight };
}

/** Round as Python does: halves to the even number. */
function round(x) {
  return x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x);
}

/** Halve by averaging, then one bicubic to the short side, then the middle: uint8 RGB. */
function fit(image, side) {
  while (image.width >= 2 * side && image.height >= 2 * side) {
    image = resize(image, image.width >> 1, image.height >> 1, FILTERS.box);
  }
  const short = Math.min(image.width, image.height);
  if (short !== side) {
    const scale = side / short;
    image = resize(image, round(image.width * scale), round(image.height * scale), FILTERS.bicubic);
  }
  const top = (image.height - side) >> 1;
  const left = (image.width - side) >> 1;
  const made = new Uint8Array(3 * side * side);
  for (let y = 0; y < side; y++) {
    const start = 3 * ((top + y) * image.width + left);
    made.set(image.pixels.subarray(start, start + 3 * side), 3 * side * y);
  }
  return made;
}

/** Return the RGB pixels of a picture file, transparent ones on white. */
async function readPicture(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  const { width, height } = bitmap;
  const [short, long] = [Math.min(width, height), Math.max(width, height)];
  if (width * height > 64e6 || short < 8 || long > 50 * short) {
    const limits = "sides of 8 or more, 50 to 1 at most, 64 million pixels";
    throw new Error(`it has ${width} x ${height} pixels, the limits are ${limits}`);
  }
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const rgba = context.getImageData(0, 0, width, height).data;
  const pixels = new Uint8Array(3 * width * height);
  for (let i = 0, j = 0; i < rgba.length; i += 4) {
    pixels[j++] = rgba[i];
    pixels[j++] = rgba[i + 1];
    pixels[j++] = rgba[i + 2];
  }
  return { pixels, width, height };
}
