// Brings the paper to the form of MNIST: light ink on dark, fitted into 20x20 of 28x28 pixels, the
// centre of mass in the middle.

const SIDE = 28;
const BOX = 20;
const CENTRE = 14;
const INK = 0.25; // of the strongest: what counts for the extent of the digit

// Ink of each pixel of a canvas, 0 to 255, whatever is lighter, the ink or the paper.
function inkOf(canvas) {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const grey = new Float32Array(data.length / 4);
  for (let i = 0; i < grey.length; i++) {
    grey[i] = 0.299 * data[4 * i] + 0.587 * data[4 * i + 1] + 0.114 * data[4 * i + 2];
  }
  const paper = Float32Array.from(grey).sort()[grey.length >> 1]; // most of it is
  return grey.map((value) => Math.abs(value - paper));
}

// The extent and the centre of mass of the ink, or null if there is none.
function measure(ink, width) {
  const least = INK * ink.reduce((most, value) => Math.max(most, value), 0);
  const box = { left: Infinity, right: -Infinity, top: Infinity, bottom: -Infinity };
  let [mass, x, y] = [0, 0, 0];
  ink.forEach((value, i) => {
    if (value <= least) return;
    const [column, row] = [i % width, Math.floor(i / width)];
    box.left = Math.min(box.left, column);
    box.right = Math.max(box.right, column + 1);
    box.top = Math.min(box.top, row);
    box.bottom = Math.max(box.bottom, row + 1);
    mass += value;
    x += value * (column + 0.5);
    y += value * (row + 0.5);
  });
  return mass ? { box, x: x / mass, y: y / mass } : null;
}

// The mean of a square of the ink, from (left, top), of which what is outside is paper.
function mean(ink, width, left, top, side) {
  const points = Math.ceil(side);
  let sum = 0;
  for (let i = 0; i < points; i++) {
    const row = Math.floor(top + ((i + 0.5) * side) / points);
    for (let j = 0; j < points; j++) {
      const column = Math.floor(left + ((j + 0.5) * side) / points);
      if (column >= 0 && column < width) sum += ink[row * width + column] ?? 0;
    }
  }
  return sum / (points * points);
}

/** A canvas of 28x28 pixels with what is on `canvas`. */
export function reduce(canvas) {
  const small = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE });
  const context = small.getContext("2d");
  const image = context.createImageData(SIDE, SIDE);
  const ink = inkOf(canvas);
  const found = measure(ink, canvas.width);
  const extent = found && Math.max(found.box.right - found.box.left, found.box.bottom - found.box.top);
  const side = Math.max(1, extent / BOX);
  for (let i = 0; i < SIDE * SIDE; i++) {
    const left = found?.x + ((i % SIDE) - CENTRE) * side;
    const top = found?.y + (Math.floor(i / SIDE) - CENTRE) * side;
    const value = found ? mean(ink, canvas.width, left, top, side) : 0;
    image.data.set([value, value, value, 255], 4 * i);
  }
  context.putImageData(image, 0, 0);
  return small;
}
