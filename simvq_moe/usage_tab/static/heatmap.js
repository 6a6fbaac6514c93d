// Layers x slots as cells: pointer and arrow keys say what a cell is, click and Enter choose it.

import { colourBar, colourOfLoad, DEAD } from './colours.js';
import { element, nounOf, number, whole } from './dom.js';
import { ticks } from './chart.js';

const NARROWEST = 4;
const WIDEST = 64;
const HIGHEST = 26;
const LOWEST = 8;
const ALL_ROWS = 520;
const NAME_HEIGHT = 13;
const MARKED = 7;

export class HeatMap {
  // layers: [{ index, name, kind, slots }], all of cells; onSlot(layer index, slot)
  constructor(layers, onSlot) {
    this.layers = layers;
    this.onSlot = onSlot;
    this.sorted = false;
    this.chosen = null;
    this.at = [0, 0];
    this.slots = Math.max(...layers.map((layer) => layer.slots));
    this.noun = nounOf(layers[0].kind);
    this.names = element('div', { class: 'heat-names', 'aria-hidden': 'true' });
    this.canvas = element('canvas', {
      tabindex: 0, role: 'application', 'aria-roledescription': 'heat map',
    });
    this.axis = element('div', { class: 'heat-axis', 'aria-hidden': 'true' });
    this.axisName = element('div', { class: 'axis-name' });
    this.readout = element('p', { class: 'heat-readout', 'aria-live': 'polite' });
    this.scroll = element('div', { class: 'heat-scroll' }, this.canvas, this.axis, this.axisName);
    this.node = element(
      'div', { class: 'heat' }, colourBar(),
      element('div', { class: 'heat-body' }, this.names, this.scroll), this.readout,
    );
    this.node.inert = true; // no pointer, key or focus before there are counts to tell
    this.listen();
  }

  listen() {
    const found = (event) => {
      const box = this.canvas.getBoundingClientRect();
      const row = Math.floor((event.clientY - box.top) / this.height);
      const column = Math.floor((event.clientX - box.left) / this.width);
      return this.layers[row] && column < this.layers[row].slots && column >= 0
        ? [row, column] : null;
    };
    this.canvas.addEventListener('pointermove', (event) => {
      const cell = found(event);
      if (cell) this.tell(cell);
    });
    this.canvas.addEventListener('click', (event) => {
      const cell = found(event);
      if (cell) this.choose(cell);
    });
    this.canvas.addEventListener('focus', () => this.tell(this.at));
    this.canvas.addEventListener('blur', () => this.draw());
    this.canvas.addEventListener('keydown', (event) => this.press(event));
  }

  press(event) {
    const moves = {
      ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
      Home: [0, -this.slots], End: [0, this.slots],
    };
    if (event.key === 'Enter' || event.key === ' ') this.choose(this.at);
    else if (moves[event.key]) {
      const [down, right] = moves[event.key];
      const row = clamp(this.at[0] + down, this.layers.length);
      this.tell([row, clamp(this.at[1] + right, this.layers[row].slots)]);
    } else return;
    event.preventDefault();
  }

  // counts: of each layer, in the order of the layers
  show(step, counts) {
    this.step = step;
    this.counts = counts;
    this.node.inert = false;
    this.order = counts.map((row) => {
      const ids = row.map((_, i) => i);
      return this.sorted ? ids.sort((a, b) => row[b] - row[a] || a - b) : ids;
    });
    this.draw();
    this.tell(this.at, { quiet: true });
  }

  slotAt([row, column]) {
    return this.order[row][column];
  }

  load(row, slot) {
    const total = this.counts[row].reduce((sum, n) => sum + n, 0);
    return total ? (this.counts[row][slot] * this.counts[row].length) / total : null;
  }

  tell(cell, { quiet = false } = {}) {
    this.at = cell;
    const [row] = cell;
    const slot = this.slotAt(cell);
    const draws = this.counts[row][slot];
    const load = this.load(row, slot);
    const state = draws === 0 ? ', dead' : load < 0.1 ? ', starved' : '';
    this.readout.textContent = `${this.layers[row].name}, ${this.noun} ${slot}: `
      + `load ${number(load)}${state}, ${whole(draws)} draws at step ${whole(this.step)}`;
    this.readout.setAttribute('aria-live', quiet ? 'off' : 'polite');
    if (!quiet && document.activeElement === this.canvas) this.draw();
  }

  choose(cell) {
    this.chosen = [cell[0], this.slotAt(cell)];
    this.tell(cell);
    this.draw();
    this.onSlot(this.layers[cell[0]].index, this.slotAt(cell));
  }

  unchoose() {
    this.chosen = null;
    this.draw();
  }

  draw() {
    if (!this.counts || !this.scroll.clientWidth) return;
    const { layers, slots } = this;
    this.height = Math.min(HIGHEST, Math.max(LOWEST, Math.round(ALL_ROWS / layers.length)));
    this.drawNames();
    this.width = Math.min(WIDEST, Math.max(NARROWEST, this.scroll.clientWidth / slots));
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [this.width * slots, this.height * layers.length];
    Object.assign(this.canvas, { width: Math.round(width * ratio), height: height * ratio });
    Object.assign(this.canvas.style, { width: `${width}px`, height: `${height}px` });
    this.canvas.setAttribute('aria-label', `Load of ${layers.length} layers by ${slots} `
      + `${this.noun}s at step ${this.step}${this.sorted ? ', sorted in each layer' : ''}. `
      + 'Arrow keys go from cell to cell; Enter shows one over time.');
    const pen = this.canvas.getContext('2d');
    pen.scale(ratio, ratio);
    layers.forEach((_, row) => this.drawRow(pen, row));
    this.outline(pen);
    this.drawAxes(width);
  }

  drawRow(pen, row) {
    const gap = this.width >= MARKED ? 1 : 0;
    const counts = this.counts[row];
    const scale = counts.length / counts.reduce((sum, n) => sum + n, 0);
    this.order[row].forEach((slot, column) => {
      const [x, y] = [column * this.width, row * this.height];
      pen.fillStyle = Number.isFinite(scale) ? colourOfLoad(counts[slot] * scale) : DEAD;
      pen.fillRect(x, y, this.width - gap, this.height - 1);
      if (counts[slot] === 0 && this.width >= MARKED) this.cross(pen, x, y);
    });
  }

  cross(pen, x, y) {
    const [w, h] = [(this.width - 1) / 2, (this.height - 1) / 2];
    const arm = Math.min(w, h) / 2;
    pen.strokeStyle = '#bbbbbb';
    pen.beginPath();
    for (const way of [-1, 1]) {
      pen.moveTo(x + w - arm, y + h - way * arm);
      pen.lineTo(x + w + arm, y + h + way * arm);
    }
    pen.stroke();
  }

  outline(pen) {
    const box = (row, slot, colour) => {
      const column = this.order[row].indexOf(slot);
      pen.lineWidth = 2;
      pen.strokeStyle = colour;
      pen.strokeRect(column * this.width, row * this.height + 1, this.width - 1, this.height - 3);
    };
    if (this.chosen) box(...this.chosen, '#e8a200');
    if (document.activeElement === this.canvas) box(this.at[0], this.slotAt(this.at), '#00b84a');
  }

  // A name a layer, or as many as have room.
  drawNames() {
    const each = Math.ceil(NAME_HEIGHT / this.height);
    this.names.replaceChildren(...this.layers.map((layer, i) => element(
      'div', { style: `height:${this.height}px;line-height:${this.height}px` },
      i % each ? '' : layer.name,
    )));
  }

  drawAxes(width) {
    this.axis.style.width = `${width}px`;
    this.axisName.style.width = `${Math.min(width, this.scroll.clientWidth)}px`;
    const marks = ticks(0, this.slots - 1, Math.max(2, width / 60)).filter(Number.isInteger);
    this.axis.replaceChildren(...marks.map((mark) => element(
      'span', { style: `left:${Math.max(4, (mark + 0.5) * this.width)}px` }, String(mark),
    )));
    this.axisName.textContent = this.sorted
      ? `rank of the ${this.noun} in its layer, by load` : `${this.noun} of the layer`;
  }
}

function clamp(value, end) {
  return Math.max(0, Math.min(end - 1, value));
}
