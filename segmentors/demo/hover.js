// Draws how similar every place is to the one under the pointer. The data is that of hovering.py. With the keyboard,
// the arrows move the place.
const COLOURS = [[16, 14, 40], [196, 62, 76], [255, 240, 190]]; // as in segmentors.training_free.pictures
const VEIL = 0.65;
let shown = [];
let cell = [0, 0];

function canvases() { // found anew each time: they are replaced when the page is drawn again
  return [...element.querySelectorAll("canvas")];
}

function loaded(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = reject;
    image.src = url;
  });
}

function bytes(image) { // the grey values, row by row
  const sheet = new OffscreenCanvas(image.width, image.height).getContext("2d");
  sheet.drawImage(image, 0, 0);
  return sheet.getImageData(0, 0, image.width, image.height).data.filter((_, i) => i % 4 === 0);
}

async function read() {
  const given = JSON.parse(props.value || "[]");
  shown = await Promise.all(given.map(async (one) => ({
    ...one, image: await loaded(one.picture), values: bytes(await loaded(one.similar)),
  })));
  canvases().forEach((canvas, i) => { canvas.hidden = i >= shown.length; });
  if (!shown.length) {
    element.querySelector("output").textContent = "";
  } else {
    cell = shown[0].grid.map((side) => Math.floor(side / 2));
    draw();
  }
}

function heat(value) {
  const [low, high, share] = value < 0.5 ? [COLOURS[0], COLOURS[1], 2 * value] : [COLOURS[1], COLOURS[2], 2 * value - 1];
  return low.map((one, i) => one + share * (high[i] - one));
}

function row(one) { // the similarities of the cell with all cells of a picture
  const count = one.grid[0] * one.grid[1];
  const first = (cell[1] * shown[0].grid[0] + cell[0]) * count;
  return one.values.subarray(first, first + count);
}

function ring(sheet, one, place) {
  const [x, y] = place.map((at, i) => (at + 0.5) / one.grid[i] * [sheet.canvas.width, sheet.canvas.height][i]);
  for (const [radius, colour] of [[9, "black"], [7, "white"]]) {
    sheet.beginPath();
    sheet.arc(x, y, radius, 0, 2 * Math.PI);
    sheet.lineWidth = 2;
    sheet.strokeStyle = colour;
    sheet.stroke();
  }
}

function pixel(one, place) {
  return place.map((at, i) => Math.floor((at + 0.5) / one.grid[i] * one.size[i]));
}

function draw() {
  const words = [];
  shown.forEach((one, number) => {
    const values = row(one);
    const low = Math.min(...values), high = Math.max(...values);
    const map = new OffscreenCanvas(...one.grid);
    const cells = new ImageData(...one.grid);
    values.forEach((value, i) => cells.data.set([...heat((value - low) / Math.max(high - low, 1)), 255], 4 * i));
    map.getContext("2d").putImageData(cells, 0, 0);
    const canvas = canvases()[number];
    const scale = 512 / Math.max(...one.size);
    [canvas.width, canvas.height] = one.size.map((side) => Math.max(1, Math.round(side * scale)));
    const sheet = canvas.getContext("2d");
    sheet.drawImage(one.image, 0, 0, canvas.width, canvas.height);
    sheet.globalAlpha = VEIL;
    sheet.drawImage(map, 0, 0, canvas.width, canvas.height);
    sheet.globalAlpha = 1;
    const best = values.indexOf(high);
    const place = number === 0 ? cell : [best % one.grid[0], Math.floor(best / one.grid[0])];
    ring(sheet, one, place);
    const [x, y] = pixel(one, place);
    words.push(number === 0 ? `Column ${x}, row ${y}`
      : `most like column ${x}, row ${y} of the second picture: ${(high / 127.5 - 1).toFixed(2)}`);
  });
  element.querySelector("output").textContent = words.join(" is ");
}

function move(to) {
  const inside = to.map((at, i) => Math.min(Math.max(at, 0), shown[0].grid[i] - 1));
  if (inside[0] !== cell[0] || inside[1] !== cell[1]) {
    cell = inside;
    draw();
  }
}

function follow(event) {
  const canvas = canvases()[0];
  if (shown.length && event.target === canvas) {
    const box = canvas.getBoundingClientRect();
    move([
      Math.floor((event.clientX - box.left) / box.width * shown[0].grid[0]),
      Math.floor((event.clientY - box.top) / box.height * shown[0].grid[1]),
    ]);
  }
}

element.addEventListener("pointermove", follow);
element.addEventListener("pointerdown", follow);
element.addEventListener("keydown", (event) => {
  const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
  if (shown.length && step && event.target === canvases()[0]) {
    event.preventDefault();
    move(cell.map((at, i) => at + step[i]));
  }
});
watch("value", read);
read();
